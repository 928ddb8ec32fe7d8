/* Shared by config.c and config_devices.c and config_memory.c. Never included outside this folder. */
#ifndef DOPPEL_MACHINE_CONFIG_PRIV_H
#define DOPPEL_MACHINE_CONFIG_PRIV_H

#include "machine/config.h"

/* Puts a copy of `value` in the place of *field. */
int config_replace(char **field, const char *value, struct error *err);

/* Cuts the first word off a list; a comma in it is written twice, as in QEMU. Returns what follows it, NULL: nothing. */
char *config_cut_path(char *text);
int config_set_id(char **field, const char *option, const char *value, struct error *err);

int config_set_disk(struct machine_config *config, const char *key, const char *value, struct error *err);
int config_set_share(struct machine_config *config, const char *key, const char *value, struct error *err);
int config_set_vsock(struct machine_config *config, const char *key, const char *value, struct error *err);
int config_set_metadata(struct machine_config *config, const char *key, const char *value, struct error *err);
int config_set_net(struct machine_config *config, const char *key, const char *value, struct error *err);
/* config_memory.c */
int config_set_memory_hotplug(struct machine_config *config, const char *key, const char *value, struct error *err);
int config_set_pmem(struct machine_config *config, const char *key, const char *value, struct error *err);
int config_set_balloon(struct machine_config *config, const char *key, const char *value, struct error *err);

#endif
