/* The client's end of src/agent/protocol.h, for doppel exec, cp and guest. Threading: none. */
#ifndef DOPPEL_CLI_AGENT_CLIENT_H
#define DOPPEL_CLI_AGENT_CLIENT_H

#include "agent/protocol.h"
#include "cli/arguments.h"

#define AGENT_CLIENT_TROUBLE 125 /* exit status when the command could not be asked for */

struct agent_client {
    int fd;
    struct agent_reader reader;
};

/* Where the agent is: a VM of the directory by name, or the Unix socket of --vsock. */
struct agent_address {
    const char *vm, *socket;
    unsigned port;
    unsigned wait_s; /* tries again until the agent is there */
    bool whole_name; /* nobody else is meant, even if nobody has this name now */
};

/* From the options that these commands share. 0 or an exit status, after a message. */
int agent_address_set(struct agent_address *address, const struct arguments *arguments, const char *command);
/* False, and told. */
bool agent_client_open(struct agent_client *client, const struct agent_address *address, const char *command);
/* Once, and without a word. */
bool agent_client_try(struct agent_client *client, const struct agent_address *address);
void agent_client_close(struct agent_client *client);
/* Blocking; false when the connection has ended. */
bool agent_client_send(struct agent_client *client, enum agent_type type, const void *body, size_t size_bytes);
bool agent_client_receive(struct agent_client *client, struct agent_frame *frame);
/* Prints why, for FAILED and whatever else is not the answer. Returns an exit status. */
int agent_client_failed(const struct agent_frame *frame, const char *command);

#endif
