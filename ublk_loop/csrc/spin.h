/* SPDX-License-Identifier: MIT */
/*
 * spin.h - whether a thread spins before it sleeps; see spin.c.
 */
#ifndef UL_SPIN_H
#define UL_SPIN_H

#include <stdbool.h>
#include <stdint.h>

/* All zero but for limit_ns: ready.  For one thread. */
struct ul_spin {
	uint64_t	limit_ns;	/* a spin's longest; 0: never spin */
	uint64_t	mean_ns;	/* of the rounds up to limit_ns */
	bool		prefers;	/* spinning is what paid best */
	bool		tries;		/* the other way, for a phase */
	uint32_t	patience;	/* phases between two tries */
	uint32_t	nr_phases;	/* ... that have passed */
	uint64_t	cost_ns;	/* of a request, the preferred way; 0: unknown */
	/* the phase */
	uint32_t	nr_rounds;
	uint64_t	nr_requests;
	uint64_t	busy_ns;
	uint64_t	last_ns;	/* when its last round ended */
};

/* How long to spin now; 0: sleep at once. */
uint64_t ul_spin_ns(const struct ul_spin *s);
/* A wait has ended at @now_ns, with @nr_requests done since the last one. */
void ul_spin_note(struct ul_spin *s, uint64_t now_ns, uint64_t nr_requests);

#endif
