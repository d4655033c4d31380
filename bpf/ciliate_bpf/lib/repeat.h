/* Loops of many turns that the verifier walks once.
 *
 *	STEP turn(__u32 number, struct state *state) { ...; return 0; }
 *	REPEAT(count, turn, &state);
 *
 * A turn gives 0 for another one, 1 to end. Worth it for loops off the way that most packets take. Where everything is inlined
 * it is an ordinary loop of a constant count, and the verifier walks every turn.
 */
#ifndef CILIATE_REPEAT_H
#define CILIATE_REPEAT_H

#include "common.h"

#ifdef CILIATE_COMPAT
#define STEP static always_inline long
#define REPEAT(count, turn, state)                                                                                     \
	do {                                                                                                           \
		__u32 number_;                                                                                         \
		for (number_ = 0; number_ < (count); number_++)                                                        \
			if (turn(number_, state))                                                                      \
				break;                                                                                 \
	} while (0)
#else
#define STEP static __noinline long
#define REPEAT(count, turn, state) bpf_loop(count, turn, state, 0)
#endif

#endif
