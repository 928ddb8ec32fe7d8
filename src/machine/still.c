/*
 * A machine that stands still: pausing, resetting, and whatever else needs every vCPU parked and nothing in flight.
 *
 * Who wants it says so under the run lock (paused, reset_wanted, unplug_wanted, call) and asks all vCPUs to park. While one of them holds, they wait in machine_park. With the
 * last one in, a wanted reset or call runs on the loop's thread, with the device lock, once no device has a request in flight; so neither a vCPU nor a
 * back end touches guest memory meanwhile. The end of the machine lets everybody go: vCPUs then see REQUEST_STOP and run nothing more.
 */
#include <errno.h>

#include "machine/machine_priv.h"
#include "machine/post_copy.h"
#include "util/log.h"

#define STILL_RETRY_NS 1000000

struct machine_call {
    int (*run)(struct machine *machine, void *ctx, struct error *err);
    void *ctx;
    struct error *err;
    int result;
    bool running, done; /* run lock */
};

static void reset_all(struct machine *machine)
{
    struct error err = {0};
    if (machine_power_on(machine, NULL, &err)) {
        log_error("cannot restart the guest: %s", err.text);
        machine_stop(machine, MACHINE_ERROR);
    } else {
        machine_tell(machine, MACHINE_EVENT_RESET, NULL);
    }
    for (unsigned i = 0; i < machine->cpu_count; i++)
        atomic_fetch_and(&machine->vcpu[i].requests, ~(REQUEST_INIT | REQUEST_STARTUP));
}

static bool machine_has_work(const struct machine *machine)
{
    return machine->reset_wanted || machine->unplug_wanted || machine->call;
}

/* With the run lock. */
static void call_refuse(struct machine *machine, int result)
{
    machine->call->result = result;
    machine->call->done = true;
    machine->call = NULL;
    pthread_cond_broadcast(&machine->run_changed);
}

void machine_still(void *ctx)
{
    struct machine *machine = ctx;
    bool quiet = machine_quiesce(machine);
    const char *full = quiet ? NULL : machine_full_disk(machine);
    pthread_mutex_lock(&machine->run_lock);
    bool ended = machine->end != MACHINE_RUNNING, reset = machine->reset_wanted, unplug = machine->unplug_wanted;
    struct machine_call *call = machine->call;
    if (!ended && full && reset)
        machine_retry_disks(machine, true);
    else if (!ended && full && call)
        call_refuse(machine, error_set(call->err, -ENOSPC, "disk %s: requests of the guest wait for room on the host; make some, then resume the virtual machine", full));
    if (!ended && !quiet) {
        machine->still_due = machine_has_work(machine);
        if (machine->still_due)
            loop_timer_arm(machine->still_timer, loop_now_ns() + STILL_RETRY_NS);
        pthread_mutex_unlock(&machine->run_lock);
        return;
    }
    if (call && !ended)
        call->running = true;
    pthread_mutex_unlock(&machine->run_lock);
    if (ended)
        return;
    if (reset) {
        machine_retry_disks(machine, false);
        reset_all(machine);
    }
    if (unplug)
        machine_unplug(machine);
    if (call)
        call->result = call->run(machine, call->ctx, call->err);

    pthread_mutex_lock(&machine->run_lock);
    machine->still_due = false;
    if (reset)
        machine->reset_wanted = false;
    if (unplug)
        machine->unplug_wanted = false;
    if (call) {
        call->running = false;
        call->done = true;
        machine->call = NULL;
    }
    pthread_cond_broadcast(&machine->run_changed);
    pthread_mutex_unlock(&machine->run_lock);
}

void machine_park(struct vcpu_thread *cpu)
{
    struct machine *machine = cpu->machine;
    pthread_mutex_lock(&machine->run_lock);
    machine->parked_count++;
    pthread_cond_broadcast(&machine->run_changed);
    while ((machine_has_work(machine) || machine->paused) && machine->end == MACHINE_RUNNING) {
        if (machine_has_work(machine) && !machine->still_due && machine->parked_count == machine->cpu_count) {
            machine->still_due = true;
            loop_timer_arm(machine->still_timer, loop_now_ns());
        }
        pthread_cond_wait(&machine->run_changed, &machine->run_lock);
    }
    machine->parked_count--;
    atomic_fetch_and(&cpu->requests, ~REQUEST_PARK);
    pthread_mutex_unlock(&machine->run_lock);
}

int machine_call_still(struct machine *machine, int (*run)(struct machine *machine, void *ctx, struct error *err), void *ctx, struct error *err)
{
    struct machine_call call = {.run = run, .ctx = ctx, .err = err};
    pthread_mutex_lock(&machine->run_lock);
    while (machine->call && machine->end == MACHINE_RUNNING) /* one at a time */
        pthread_cond_wait(&machine->run_changed, &machine->run_lock);
    bool possible = machine->started && machine->end == MACHINE_RUNNING;
    if (possible) {
        machine->call = &call;
        pthread_cond_broadcast(&machine->run_changed); /* those parked already look again */
        vcpu_threads_request(machine, REQUEST_PARK);
    }
    while (possible && !call.done && (machine->end == MACHINE_RUNNING || call.running))
        pthread_cond_wait(&machine->run_changed, &machine->run_lock);
    if (possible && !call.done)
        machine->call = NULL;
    bool started = machine->started;
    pthread_mutex_unlock(&machine->run_lock);
    if (call.done)
        return call.result;
    return started ? error_set(err, -ESRCH, "the virtual machine has ended") : error_set(err, -EINVAL, "the virtual machine has not been started");
}

void machine_reset(struct machine *machine)
{
    if (machine->config->on_reset == ON_RESET_EXIT) {
        machine_stop(machine, MACHINE_RESET);
        return;
    }
    pthread_mutex_lock(&machine->run_lock);
    machine->reset_wanted = true;
    pthread_cond_broadcast(&machine->run_changed);
    vcpu_threads_request(machine, REQUEST_PARK);
    pthread_mutex_unlock(&machine->run_lock);
}

void machine_want_unplug(void *ctx)
{
    struct machine *machine = ctx;
    pthread_mutex_lock(&machine->run_lock);
    machine->unplug_wanted = true;
    pthread_cond_broadcast(&machine->run_changed);
    vcpu_threads_request(machine, REQUEST_PARK);
    pthread_mutex_unlock(&machine->run_lock);
}

void machine_stop(struct machine *machine, enum machine_end end)
{
    pthread_mutex_lock(&machine->run_lock);
    bool first = machine->end == MACHINE_RUNNING;
    if (first)
        machine->end = end;
    pthread_cond_broadcast(&machine->run_changed);
    /* With the lock: a parked vCPU that sees the end must see the request too, and not run what a reset is writing. */
    vcpu_threads_request(machine, REQUEST_STOP);
    pthread_mutex_unlock(&machine->run_lock);
    post_copy_target_end(machine);
    if (first)
        machine_tell(machine, MACHINE_EVENT_ENDED, machine_end_name(end));
}

int machine_pause(struct machine *machine, struct error *err)
{
    pthread_mutex_lock(&machine->run_lock);
    bool already = machine->paused || !machine->started;
    machine->paused = true;
    vcpu_threads_request(machine, REQUEST_PARK);
    while (machine->started && machine->paused && machine->end == MACHINE_RUNNING &&
           (machine->parked_count < machine->cpu_count || machine->reset_wanted))
        pthread_cond_wait(&machine->run_changed, &machine->run_lock);
    bool paused = machine->paused, ended = machine->end != MACHINE_RUNNING;
    pthread_mutex_unlock(&machine->run_lock);
    if (ended)
        return error_set(err, -ESRCH, "the virtual machine has ended");
    if (paused && !already)
        machine_tell(machine, MACHINE_EVENT_PAUSED, NULL);
    return paused ? 0 : error_set(err, -ECANCELED, "the virtual machine was resumed meanwhile");
}

bool machine_pause_now(struct machine *machine, const char *why)
{
    pthread_mutex_lock(&machine->run_lock);
    bool already = machine->paused;
    machine->paused = true;
    vcpu_threads_request(machine, REQUEST_PARK);
    pthread_mutex_unlock(&machine->run_lock);
    if (!already)
        machine_tell(machine, MACHINE_EVENT_PAUSED, why);
    return !already;
}

/* Guests that look (Linux's watchdogs) learn that their processors stood still, and do not take it for a hang. */
static void tell_clocks(struct machine *machine)
{
    for (unsigned i = 0; machine->parked_count == machine->cpu_count && i < machine->cpu_count; i++)
        pvclock_stopped(&machine->vcpu[i].pvclock, machine->memory);
}

static void retry_disks(void *ctx)
{
    machine_retry_disks(ctx, false);
}

int machine_resume(struct machine *machine, struct error *err)
{
    pthread_mutex_lock(&machine->run_lock);
    bool was_paused = machine->paused;
    if (machine->gone) {
        pthread_mutex_unlock(&machine->run_lock);
        return error_set(err, -EBUSY, "the guest runs where it has migrated to, and only some of its memory is still here; doppel migrate --recover goes on sending it");
    }
    if (machine->given_away && machine_give_disks(machine, false, err)) {
        pthread_mutex_unlock(&machine->run_lock);
        return error_prefix(err, "the guest may run where it has migrated to");
    }
    machine->given_away = false;
    if (was_paused)
        tell_clocks(machine);
    machine->paused = false;
    pthread_cond_broadcast(&machine->run_changed);
    pthread_mutex_unlock(&machine->run_lock);
    if (was_paused)
        loop_hold(machine->loop, false); /* of a migration that nobody knows the end of (migrate_out.c) */
    if (was_paused)
        loop_post(machine->loop, retry_disks, machine);
    if (was_paused)
        machine_tell(machine, MACHINE_EVENT_RESUMED, NULL);
    return was_paused ? 0 : error_set(err, -EALREADY, "the virtual machine is not paused");
}

bool machine_is_paused(struct machine *machine)
{
    pthread_mutex_lock(&machine->run_lock);
    bool paused = machine->paused;
    pthread_mutex_unlock(&machine->run_lock);
    return paused;
}
