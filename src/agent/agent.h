/* doppel-agent, inside: one process serves one connection (session). */
#ifndef DOPPEL_AGENT_AGENT_H
#define DOPPEL_AGENT_AGENT_H

#include "agent/protocol.h"

/* Statuses of a command that never ran, as shells and others have them. */
#define AGENT_STATUS_TROUBLE 125
#define AGENT_STATUS_NOT_EXECUTABLE 126
#define AGENT_STATUS_NOT_FOUND 127

struct session {
    int fd;
    struct agent_reader reader;
    uint8_t frame[AGENT_HEADER_BYTES + AGENT_BODY_MAX]; /* for what is sent */
};

/* Blocking. 1, 0 at the end of the connection, negative when the peer makes no sense. */
int session_receive(struct session *session, struct agent_frame *frame);
/* Blocking. False: the peer has gone. */
bool session_send(struct session *session, enum agent_type type, const void *body, size_t size_bytes);
/* FAILED with a line of text; always false. */
bool session_fail(struct session *session, uint8_t status, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* Serves one connection. `fd` stays the caller's. */
void session_serve(struct session *session);

/* Requests. `frame` is the first of the connection. */
void serve_exec(struct session *session, const struct agent_frame *frame);
void serve_put(struct session *session, const struct agent_frame *frame);
void serve_get(struct session *session, const struct agent_frame *frame);
void serve_identity(struct session *session, const struct agent_frame *frame);
void serve_info(struct session *session, const struct agent_frame *frame);

/* ---- users (user.c): /etc/passwd and /etc/group are read here, because a static program has no other way ---- */

struct user {
    unsigned uid, gid;
    char name[64], home[256], shell[256];
    unsigned group_count, group[64];
};

/* "name", "uid" or "uid:gid". 0 or -ENOENT. */
int user_find(struct user *user, const char *text);

#endif
