/*
 * Disk I/O through io_uring. The ring's descriptor is readable while completions wait, so the event loop polls it directly.
 *
 * Submissions of one round of the loop are batched: block_task's are queued on `waiting` and an event submits them together.
 * Invariants: `submitted` holds the tasks that are in the ring, in the order of their entries; the last `unsent` of them are in the submission queue
 * but unknown to the kernel still. At most RING_ENTRIES tasks are in the ring, so that the completion queue (twice as large) never overflows.
 * Threading: with the device lock held; io_uring_enter only from the loop's thread.
 */
#include "block/block_priv.h"

#include <errno.h>
#include <liburing.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "util/log.h"
#include "util/sandbox_rules.h"

SANDBOX_ALLOW(IN_LOOP | IN_MAIN, io_uring_enter);

#define RING_ENTRIES 128u

struct uring {
    struct block_io io; /* first */
    struct io_uring ring;
    struct loop_fd *source;
    struct loop_event *submit_event;
    struct block_task_list waiting, submitted;
    unsigned submitted_count, unsent;
    bool dead; /* the kernel refuses submissions for good */
};

static void prepare(struct io_uring_sqe *sqe, struct block_task *task)
{
    switch (task->kind) {
    case TASK_READ:
        io_uring_prep_readv(sqe, task->fd, task->iov, task->iov_count, task->offset_bytes);
        break;
    case TASK_WRITE:
        io_uring_prep_writev(sqe, task->fd, task->iov, task->iov_count, task->offset_bytes);
        break;
    case TASK_SYNC:
        io_uring_prep_fsync(sqe, task->fd, IORING_FSYNC_DATASYNC);
        break;
    case TASK_FALLOCATE:
        io_uring_prep_fallocate(sqe, task->fd, task->mode, (off_t)task->offset_bytes, (off_t)task->length_bytes);
        break;
    }
    io_uring_sqe_set_data(sqe, task);
}

static void fill_ring(struct uring *uring)
{
    struct block_task *task;
    struct io_uring_sqe *sqe;

    while (uring->submitted_count < RING_ENTRIES && (task = TAILQ_FIRST(&uring->waiting)) &&
           (sqe = io_uring_get_sqe(&uring->ring))) {
        TAILQ_REMOVE(&uring->waiting, task, link);
        prepare(sqe, task);
        TAILQ_INSERT_TAIL(&uring->submitted, task, link);
        uring->submitted_count++;
        uring->unsent++;
    }
}

/* The kernel will not take any more: what it has not seen fails. */
static void give_up(struct uring *uring, int code)
{
    struct block_task *task;

    if (!uring->dead)
        log_error("disk I/O: io_uring stopped working: %s; requests fail from here on (io=threads avoids it)", strerror(-code));
    uring->dead = true;
    for (; uring->unsent; uring->unsent--, uring->submitted_count--) {
        task = TAILQ_LAST(&uring->submitted, block_task_list);
        TAILQ_REMOVE(&uring->submitted, task, link);
        TAILQ_INSERT_HEAD(&uring->waiting, task, link);
    }
    while ((task = TAILQ_FIRST(&uring->waiting))) {
        TAILQ_REMOVE(&uring->waiting, task, link);
        task->done(task, -EIO);
    }
}

static void send_tasks(void *ctx)
{
    struct uring *uring = ctx;

    if (uring->dead) {
        give_up(uring, -EIO);
        return;
    }
    fill_ring(uring);
    while (uring->unsent) {
        int ret = io_uring_submit(&uring->ring);

        if (ret >= 0) {
            uring->unsent -= (unsigned)ret < uring->unsent ? (unsigned)ret : uring->unsent;
            if (ret > 0)
                continue;
            ret = -EAGAIN;
        }
        if (ret == -EINTR)
            continue;
        if (ret == -EAGAIN || ret == -EBUSY) {
            loop_event_raise(uring->submit_event); /* short of memory for the moment: after the completions */
            return;
        }
        give_up(uring, ret);
        return;
    }
}

static void reap(void *ctx, unsigned events)
{
    struct uring *uring = ctx;
    struct io_uring_cqe *cqe;

    while (io_uring_peek_cqe(&uring->ring, &cqe) == 0) {
        struct block_task *task = io_uring_cqe_get_data(cqe);
        int result = cqe->res;

        io_uring_cqe_seen(&uring->ring, cqe);
        TAILQ_REMOVE(&uring->submitted, task, link);
        uring->submitted_count--;
        task->done(task, result);
    }
    if (!TAILQ_EMPTY(&uring->waiting))
        send_tasks(uring);
}

static void uring_submit(struct block_io *io, struct block_task *task)
{
    struct uring *uring = (struct uring *)io;

    TAILQ_INSERT_TAIL(&uring->waiting, task, link);
    loop_event_raise(uring->submit_event);
}

static int probe(struct uring *uring)
{
    static const int needed[] = {IORING_OP_READV, IORING_OP_WRITEV, IORING_OP_FSYNC, IORING_OP_FALLOCATE};
    struct io_uring_probe *found = io_uring_get_probe_ring(&uring->ring);
    int ret = found ? 0 : -EOPNOTSUPP;

    for (unsigned i = 0; found && i < sizeof(needed) / sizeof(needed[0]); i++) {
        if (!io_uring_opcode_supported(found, needed[i]))
            ret = -EOPNOTSUPP;
    }
    if (found)
        io_uring_free_probe(found);
    return ret;
}

/* A ring that can do what is done here and nothing else, where the kernel (5.10) has that: it opens no files for whoever gets hold of it. */
static int ring_create(struct uring *uring)
{
    static const uint8_t operations[] = {IORING_OP_READV, IORING_OP_WRITEV, IORING_OP_FSYNC, IORING_OP_FALLOCATE};
    struct io_uring_restriction allowed[sizeof(operations) + 2];
    unsigned count = 0;
    int ret = io_uring_queue_init(RING_ENTRIES, &uring->ring, IORING_SETUP_R_DISABLED);

    if (ret == -EINVAL)
        return io_uring_queue_init(RING_ENTRIES, &uring->ring, 0);
    if (ret < 0)
        return ret;
    memset(allowed, 0, sizeof(allowed));
    for (; count < sizeof(operations); count++) {
        allowed[count].opcode = IORING_RESTRICTION_SQE_OP;
        allowed[count].sqe_op = operations[count];
    }
    allowed[count].opcode = IORING_RESTRICTION_REGISTER_OP;
    allowed[count++].register_op = IORING_REGISTER_PROBE;
    /* Debian 12's liburing declares functions for both and lacks one. */
    if (syscall(SYS_io_uring_register, uring->ring.ring_fd, IORING_REGISTER_RESTRICTIONS, allowed, count) == 0 &&
        syscall(SYS_io_uring_register, uring->ring.ring_fd, IORING_REGISTER_ENABLE_RINGS, NULL, 0) == 0)
        return 0;
    ret = -errno;
    io_uring_queue_exit(&uring->ring);
    return ret;
}

static int uring_create(struct block_io **io, struct loop *loop)
{
    struct uring *uring = calloc(1, sizeof(*uring));
    int ret;

    if (!uring)
        return -ENOMEM;
    uring->io.ops = &block_io_uring_ops;
    TAILQ_INIT(&uring->waiting);
    TAILQ_INIT(&uring->submitted);
    ret = ring_create(uring);
    if (ret < 0)
        goto fail;
    ret = probe(uring);
    if (ret < 0)
        goto fail_ring;
    uring->submit_event = loop_event_create(loop, send_tasks, uring);
    if (!uring->submit_event) {
        ret = -ENOMEM;
        goto fail_ring;
    }
    ret = loop_fd_add(loop, uring->ring.ring_fd, LOOP_READ, reap, uring, &uring->source);
    if (ret < 0)
        goto fail_event;
    *io = &uring->io;
    return 0;

fail_event:
    loop_event_destroy(uring->submit_event);
fail_ring:
    io_uring_queue_exit(&uring->ring);
fail:
    free(uring);
    return ret;
}

static void uring_destroy(struct block_io *io)
{
    struct uring *uring = (struct uring *)io;

    loop_fd_remove(uring->source);
    loop_event_destroy(uring->submit_event);
    io_uring_queue_exit(&uring->ring);
    free(uring);
}

const struct block_io_ops block_io_uring_ops = {
    .name = "uring",
    .create = uring_create,
    .submit = uring_submit,
    .destroy = uring_destroy,
};
