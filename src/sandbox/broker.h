/*
 * A process that opens files for control threads once these can open none: those that a client of the control socket named, and no others. It is started before the sandbox
 * closes, and believes nothing that the program says: what it calls named is what it has read itself, from connections that others have made to the control sockets.
 *
 * Control threads notice nothing. Their recv(), open(), rename(), unlink() and stat() wait in the kernel (seccomp's user notification) until the broker has done them.
 */
#ifndef DOPPEL_SANDBOX_BROKER_H
#define DOPPEL_SANDBOX_BROKER_H

#include <stdbool.h>

struct sock_fprog;

/* Single-threaded. A descriptor that the broker lives as long as, or -errno. `omit`: sandbox_config.omit; a broker that lacks a rule says so on standard error. */
int broker_start(const char *omit);
/* `listener` is a socket that control clients connect to. Before broker_close_doors. */
int broker_add_socket(int broker, int listener);
/* No more sockets from here on. `filter`: the broker's own (filter_make, IN_BROKER). `confined`: the callers have limits of their own, for what was not named. True: it can do its work on this host. */
bool broker_close_doors(int broker, const struct sock_fprog *filter, bool confined);
/* Calls of a thread whose filter gave this descriptor are the broker's from here on. Takes the descriptor over. */
int broker_serve(int broker, int notifications);

#endif
