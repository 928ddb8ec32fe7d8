/* The directory of virtual machines, inside: shared by instance.c (one's own) and instance_list.c (all of them). */
#ifndef DOPPEL_CONTROL_INSTANCE_PRIV_H
#define DOPPEL_CONTROL_INSTANCE_PRIV_H

#include "control/instance.h"

/* A descriptor of the root, checked to be this user's alone. */
int instance_root_open(struct error *err);
/* The root's lock, under which names are given out and taken back: a descriptor to close. */
int instance_root_lock(int root, struct error *err);
/* The VM's directory, not through a link, this user's. */
int instance_dir_open(int root, const char *name);
bool instance_dir_alive(int dir);
/* All that is under this name, which is not alive. Root's lock held. */
int instance_dir_remove(int root, const char *name);

#endif
