// SPDX-License-Identifier: MIT
/*
 * spin.c - whether a thread spins before it sleeps: by what a request takes
 * either way, measured again and again.
 *
 * A spin spares us a sleep and the client a wake-up, and doubles the speed of
 * a client that waits for each request.  It costs a CPU, and where somebody
 * else needs that (the client; another guest of the machine, of which we see
 * nothing but lost time) a request takes several times as long.  No rule tells
 * these apart, a clock does:
 *
 *   round	from the end of one wait to that of the next
 *   phase	some rounds of one way; its cost is the time of a request
 *   try	a phase of the other way, given up early if it costs twice as much
 *
 * After a try the cheaper way is preferred.  Each try in vain doubles the
 * phases to the next one; a sudden change of the cost brings it forward.
 * Spinning has to be clearly cheaper, and a client whose requests are further
 * apart than the longest spin is not spun for.
 */
#include "spin.h"

#define PHASE_ROUNDS	32
#define EARLY_ROUNDS	8
#define PATIENCE_MAX	64
/* Spinning pays if a request takes at most so much of what it takes sleeping. */
#define PAYS_PERCENT	95
/* A spin lasts so many of the mean round, which ends a burst early. */
#define SPIN_ROUNDS	4
#define SPIN_NS_MIN	50000
/* The client had nothing to do for so long: that is no round. */
#define PAUSE_NS	20000000

uint64_t ul_spin_ns(const struct ul_spin *s)
{
	uint64_t ns = SPIN_ROUNDS * s->mean_ns;

	if (s->prefers == s->tries)
		return 0;
	if (ns < SPIN_NS_MIN)
		ns = SPIN_NS_MIN;
	return ns < s->limit_ns ? ns : s->limit_ns;
}

static void spin_begin_phase(struct ul_spin *s)
{
	s->nr_rounds = 0;
	s->nr_requests = 0;
	s->busy_ns = 0;
}

static void spin_end_try(struct ul_spin *s, uint64_t cost_ns)
{
	uint64_t spinning_ns = s->prefers ? s->cost_ns : cost_ns;
	uint64_t sleeping_ns = s->prefers ? cost_ns : s->cost_ns;
	bool pays = 100 * spinning_ns <= PAYS_PERCENT * sleeping_ns;

	if (pays != s->prefers) {
		s->prefers = pays;
		s->cost_ns = cost_ns;
		s->patience = 1;
	} else if (s->patience < PATIENCE_MAX) {
		s->patience *= 2;
	}
	s->tries = false;
	s->nr_phases = 0;
}

/* Requests are too far apart for a spin. */
static void spin_forget(struct ul_spin *s)
{
	s->prefers = false;
	s->cost_ns = 0;
}

static void spin_end_phase(struct ul_spin *s, uint64_t cost_ns)
{
	bool changed = cost_ns > 2 * s->cost_ns || 2 * cost_ns < s->cost_ns;

	if (s->tries) {
		spin_end_try(s, cost_ns);
		return;
	}
	if (s->busy_ns > s->nr_rounds * s->limit_ns) {
		spin_forget(s);
		return;
	}
	if (changed) {
		s->patience = 1;
		s->nr_phases = 0;
	}
	s->cost_ns = changed ? cost_ns : (3 * s->cost_ns + cost_ns) / 4;
	s->tries = ++s->nr_phases >= s->patience;
}

void ul_spin_note(struct ul_spin *s, uint64_t now_ns, uint64_t nr_requests)
{
	uint64_t round_ns = now_ns - s->last_ns, cost_ns;

	s->last_ns = now_ns;
	if (round_ns > PAUSE_NS)
		return;
	if (round_ns <= s->limit_ns)
		s->mean_ns += ((int64_t)round_ns - (int64_t)s->mean_ns) / 8;
	s->busy_ns += round_ns;
	s->nr_requests += nr_requests;
	if (++s->nr_rounds < EARLY_ROUNDS || !s->nr_requests)
		return;
	cost_ns = s->busy_ns / s->nr_requests;
	if (s->nr_rounds < PHASE_ROUNDS &&
	    !(s->tries && cost_ns > 2 * s->cost_ns))
		return;
	spin_end_phase(s, cost_ns);
	spin_begin_phase(s);
}
