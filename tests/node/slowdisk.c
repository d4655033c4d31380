/* Preloaded: every flush to the disk takes as many milliseconds as the file $SLOW_DISK says, and is only then done.
 * The file is read again all the time: a flush that is held is let go by a smaller number.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define STEP_MS 10

static long long now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

static long long wanted_ms(void)
{
	const char *path = getenv("SLOW_DISK");
	FILE *file = path ? fopen(path, "re") : NULL;
	long long wanted = 0;

	if (file) {
		if (fscanf(file, "%lld", &wanted) != 1)
			wanted = 0;
		fclose(file);
	}
	return wanted;
}

static void wait_for_disk(void)
{
	const struct timespec step = { .tv_nsec = STEP_MS * 1000000L };
	long long began = now_ms();
	int kept = errno;

	while (now_ms() - began < wanted_ms())
		nanosleep(&step, NULL);
	errno = kept;
}

static int flush(const char *name, int descriptor)
{
	int (*real)(int) = NULL;

	*(void **)&real = dlsym(RTLD_NEXT, name);
	wait_for_disk();
	return real(descriptor);
}

int fsync(int descriptor)
{
	return flush("fsync", descriptor);
}

int fdatasync(int descriptor)
{
	return flush("fdatasync", descriptor);
}

int syncfs(int descriptor)
{
	return flush("syncfs", descriptor);
}
