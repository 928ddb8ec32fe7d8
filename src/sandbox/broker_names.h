/* The names of files that control clients said: texts of JSON in what they sent. Of a broker's one thread. */
#ifndef DOPPEL_SANDBOX_BROKER_NAMES_H
#define DOPPEL_SANDBOX_BROKER_NAMES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct broker_names;

struct broker_names *broker_names_create(void);
void broker_names_destroy(struct broker_names *names);
/* The next bytes of a connection; pieces may end anywhere. No bytes: it has ended. */
void broker_names_take(struct broker_names *names, uint64_t connection, const char *data, size_t size);
/* Alone in a text, or one of its parts: "PATH,readonly", "path=PATH,id=x". */
bool broker_names_has(const struct broker_names *names, const char *path);
/* A name with a dot and six characters behind it. */
bool broker_names_has_draft(const struct broker_names *names, const char *path);
/* Drafts that were made. */
void broker_names_made(struct broker_names *names, const char *path);
bool broker_names_is_made(const struct broker_names *names, const char *path);

#endif
