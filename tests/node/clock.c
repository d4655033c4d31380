/* Preloaded into an agent: the clock on the wall is as many seconds ahead as the file $CLOCK_AHEAD says, at any moment.
 * Clocks that count from boot stay as they are, as when somebody sets the time of the machine.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

static time_t ahead(void)
{
	const char *path = getenv("CLOCK_AHEAD");
	FILE *file = path ? fopen(path, "re") : NULL;
	long long seconds = 0;

	if (file) {
		if (fscanf(file, "%lld", &seconds) != 1)
			seconds = 0;
		fclose(file);
	}
	return (time_t)seconds;
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
	static int (*real)(clockid_t, struct timespec *);

	if (!real)
		*(void **)&real = dlsym(RTLD_NEXT, "clock_gettime");
	int code = real(clock, now);
	if (!code && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
		now->tv_sec += ahead();
	return code;
}

int gettimeofday(struct timeval *now, void *zone)
{
	struct timespec precise;

	(void)zone;
	clock_gettime(CLOCK_REALTIME, &precise);
	now->tv_sec = precise.tv_sec;
	now->tv_usec = precise.tv_nsec / 1000;
	return 0;
}

time_t time(time_t *result)
{
	struct timespec now;

	clock_gettime(CLOCK_REALTIME, &now);
	if (result)
		*result = now.tv_sec;
	return now.tv_sec;
}
