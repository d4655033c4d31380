/* The checksum of SCTP (CRC32c, RFC 9260 appendix A) after a change of the ports, without reading the rest.
 *
 * A CRC is linear: what changes in it depends on the changed bits and on how many bytes follow them, on nothing else. The
 * change of the first four bytes of n is their difference times x^(8n) modulo the polynomial.
 */
#ifndef CILIATE_SCTP_H
#define CILIATE_SCTP_H

#include "common.h"

#define CRC32C_POLYNOMIAL 0x82f63b78U /* bits reflected: x^0 is the highest */

/* x^(8 * 2^i) modulo the polynomial */
const __u32 crc32c_powers[16] = {
	0x00800000, 0x00008000, 0x82f63b78, 0x6ea2d55c, 0x18b8ea18, 0x510ac59a, 0xb82be955, 0xb8fdb1e7,
	0x88e56f72, 0x74c360a4, 0xe4172b16, 0x0d65762a, 0x35d73a62, 0x28461564, 0xbf455269, 0xe2ea32dc,
};

/* All ones where the lowest bit is set. No branch: the verifier would walk every way through 32 of them. */
static always_inline __u32 all_ones(__u32 bit)
{
	bit &= 1;
	asm volatile("" : "+r"(bit));
	return -bit;
}

/* The product of value and a power of x. */
FUNCTION __u32 crc32c_multiply(__u32 index, __u32 value)
{
	__u32 factor = crc32c_powers[index & 15], product = 0;
	int bit;

	for (bit = 31; bit >= 0; bit--) {
		product ^= value & all_ones(factor >> bit);
		value = value >> 1 ^ (CRC32C_POLYNOMIAL & all_ones(value));
	}
	return product;
}

/* What the checksum changes by where the first word of length bytes changes by difference (lowest byte first). */
static always_inline __u32 sctp_change(__u32 difference, __u32 length)
{
	__u32 change = difference;
	int i;

	for (i = 0; i < 16; i++)
		if (length >> i & 1)
			change = crc32c_multiply(i, change);
	return change;
}

#endif
