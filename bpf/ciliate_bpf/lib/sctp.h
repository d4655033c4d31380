/* The checksum of SCTP (CRC32c, RFC 9260 appendix A) after a change of the ports, without reading the rest.
 *
 * A CRC is linear: what changes in it depends on the changed bits and on how many bytes follow them, on nothing else. The
 * change of the first four bytes of n is their difference times x^(8n) modulo the polynomial.
 */
#ifndef CILIATE_SCTP_H
#define CILIATE_SCTP_H

#include "common.h"
#include "repeat.h"

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

struct crc32c_product {
	__u32 factor;
	__u32 value;
	__u32 product;
};

STEP crc32c_multiply_bit(__u32 bit, struct crc32c_product *of)
{
	of->product ^= of->value & all_ones(of->factor >> (31 - bit));
	of->value = of->value >> 1 ^ (CRC32C_POLYNOMIAL & all_ones(of->value));
	return 0;
}

/* The product of value and a power of x. */
FUNCTION __u32 crc32c_multiply(__u32 index, __u32 value)
{
	struct crc32c_product of = {.factor = crc32c_powers[index & 15], .value = value};

	REPEAT(32, crc32c_multiply_bit, &of);
	return of.product;
}

struct sctp_shift {
	__u32 length;
	__u32 change;
};

STEP sctp_shift_by(__u32 number, struct sctp_shift *of)
{
	if (of->length >> (number & 15) & 1)
		of->change = crc32c_multiply(number, of->change);
	return 0;
}

/* What the checksum changes by where the first word of length bytes changes by difference (lowest byte first). */
static always_inline __u32 sctp_change(__u32 difference, __u32 length)
{
	struct sctp_shift of = {.length = length, .change = difference};

	REPEAT(16, sctp_shift_by, &of);
	return of.change;
}

#endif
