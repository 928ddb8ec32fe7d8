/*
 * Which system calls a kind of thread may make, written beside the code that makes them:
 *
 *     SANDBOX_ALLOW(IN_LOOP, epoll_wait);
 *     SANDBOX_ALLOW_IF(IN_LOOP | IN_VCPU, mmap, ARG_LACKS(2, PROT_EXEC));
 *     SANDBOX_ALLOW_WITH(SANDBOX_NET_USER, IN_LOOP, socket, ARG_IS(0, AF_INET));
 *
 * The macros leave records in a section of the program; src/sandbox makes the filters of them. What is not allowed for a thread ends the program, with a line that
 * names thread and call. Several rules for one call are alternatives. At file scope only.
 */
#ifndef DOPPEL_UTIL_SANDBOX_RULES_H
#define DOPPEL_UTIL_SANDBOX_RULES_H

#include <stdint.h>
#include <sys/syscall.h>

/* Kinds of threads, a set. */
#define IN_MAIN 1u    /* waits for the end and for signals, cleans up */
#define IN_LOOP 2u    /* the machine's loop: all devices and back ends */
#define IN_VCPU 4u    /* guest code and what the engine does for it */
#define IN_WORKER 8u  /* blocking disk I/O */
#define IN_SHARE 16u  /* shared directories */
#define IN_API 32u    /* answers control requests */
#define IN_BROKER 64u /* opens files for the API's (sandbox/broker.h) */
#define SANDBOX_KINDS 7
#define IN_GUEST (IN_LOOP | IN_VCPU | IN_WORKER)
#define IN_ALL ((1u << SANDBOX_KINDS) - 1)
#define IN_PROGRAM (IN_ALL & ~IN_BROKER) /* where there is more than one thread */

/* What rules may depend on. A set; 0: nothing. */
#define SANDBOX_NET_USER 1u /* user networking: the loop makes connections for the guest */
#define SANDBOX_VSOCK 2u    /* the loop connects to Unix sockets for the guest */
#define SANDBOX_DIRECT 4u   /* vCPUs run user code in processes of their own */
#define SANDBOX_KVM 8u      /* the host's kernel runs the guest */

struct sandbox_rule {
    const char *name; /* of the call */
    uint32_t threads, needs;
    int number;
    int argument;         /* compared, -1: none */
    uint64_t mask, value; /* (argument & mask) == value */
};

#define ARG_IS(argument, value) argument, ~0ull, value
#define ARG_LACKS(argument, bits) argument, bits, 0
#define ARG_HAS(argument, bits) argument, bits, bits

#define SANDBOX_RULE__(counter, needs, threads, call, argument, mask, value)                                                              \
    static const struct sandbox_rule sandbox_rule_##counter __attribute__((used, section("sandbox_allow"), aligned(8))) = {#call, threads, needs, SYS_##call, argument, mask, value}
#define SANDBOX_RULE_(counter, needs, threads, call, ...) SANDBOX_RULE__(counter, needs, threads, call, __VA_ARGS__)
#define SANDBOX_ALLOW(threads, call) SANDBOX_RULE_(__COUNTER__, 0, threads, call, -1, 0, 0)
#define SANDBOX_ALLOW_IF(threads, call, ...) SANDBOX_RULE_(__COUNTER__, 0, threads, call, __VA_ARGS__)
#define SANDBOX_ALLOW_WITH(needs, threads, call) SANDBOX_RULE_(__COUNTER__, needs, threads, call, -1, 0, 0)
#define SANDBOX_ALLOW_WITH_IF(needs, threads, call, ...) SANDBOX_RULE_(__COUNTER__, needs, threads, call, __VA_ARGS__)

#endif
