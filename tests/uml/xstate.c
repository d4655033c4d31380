/* User-mode Linux 6.1 sets the floating point state of its processes by a buffer of 2,696 bytes. Where the host's CPU has
 * more state than that (AMX), the host takes all of it or nothing (EFAULT), and the first process dies.
 *
 * Preloaded, this fills the buffer up with zeros, which is the initial state of what is missing; nothing inside uses it.
 */
#include <linux/elf.h>
#include <linux/ptrace.h>
#include <linux/types.h>
#include <linux/uio.h>

#define NEXT ((void *)-1L)
#define WHOLE 16384 /* the host takes as much of it as it has */
#define HEADER 512  /* the features in use, a bit each */
#define AMX ((1ULL << 17) | (1ULL << 18))

typedef long (*ptrace_function)(long request, long process, void *address, void *data);

void *dlsym(void *handle, const char *name);
void *memcpy(void *to, const void *from, unsigned long size);

/* not on the stack: the kernel's threads have small ones. There is one CPU, and no thread of the kernel is preempted. */
static __u64 whole[WHOLE / 8];
static ptrace_function real;

__attribute__((constructor)) static void find(void)
{
	real = (ptrace_function)dlsym(NEXT, "ptrace");
}

long ptrace(long request, long process, void *address, void *data)
{
	struct iovec *given = data, filled = {whole, sizeof(whole)};

	if (request != PTRACE_SETREGSET || (long)address != NT_X86_XSTATE || given->iov_len > sizeof(whole))
		return real(request, process, address, data);
	memcpy(whole, given->iov_base, given->iov_len);
	whole[HEADER / 8] &= ~AMX;
	return real(request, process, address, &filled);
}
