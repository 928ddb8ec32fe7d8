/* Users of the guest (agent.h). Lines that make no sense are passed over. Threading: none. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "agent/agent.h"

static bool number(const char *text, unsigned *value)
{
    char *end;
    if (!text || *text < '0' || *text > '9')
        return false;
    errno = 0;
    unsigned long long wide = strtoull(text, &end, 10);
    *value = (unsigned)wide;
    return !errno && !*end && wide < 0xFFFFFFFFull;
}

/* Cuts a line at colons; false when there are fewer fields. */
static bool split(char *line, char **field, unsigned count)
{
    line[strcspn(line, "\n")] = '\0';
    for (unsigned i = 0; i < count; i++)
        if (!(field[i] = strsep(&line, ":")))
            return false;
    return true;
}

static bool find_passwd(struct user *user, const char *name, unsigned uid, bool by_uid)
{
    char line[1024], *field[7];
    FILE *file = fopen("/etc/passwd", "re");
    bool found = false;
    while (file && !found && fgets(line, sizeof line, file)) {
        unsigned its_uid, its_gid;
        if (!split(line, field, 7) || !number(field[2], &its_uid) || !number(field[3], &its_gid))
            continue;
        found = by_uid ? its_uid == uid : strcmp(field[0], name) == 0;
        if (!found)
            continue;
        user->uid = its_uid;
        user->gid = its_gid;
        snprintf(user->name, sizeof user->name, "%s", field[0]);
        snprintf(user->home, sizeof user->home, "%s", *field[5] ? field[5] : "/");
        snprintf(user->shell, sizeof user->shell, "%s", *field[6] ? field[6] : "/bin/sh");
    }
    if (file)
        fclose(file);
    return found;
}

static void find_groups(struct user *user)
{
    static const unsigned most = sizeof user->group / sizeof *user->group;
    char line[4096], *field[4];
    FILE *file = fopen("/etc/group", "re");
    user->group_count = 0;
    while (file && user->group_count < most && fgets(line, sizeof line, file)) {
        unsigned gid;
        if (!split(line, field, 4) || !number(field[2], &gid))
            continue;
        for (char *rest = field[3], *member; (member = strsep(&rest, ","));) {
            if (strcmp(member, user->name) == 0) {
                user->group[user->group_count++] = gid;
                break;
            }
        }
    }
    if (file)
        fclose(file);
}

int user_find(struct user *user, const char *text)
{
    char name[64];
    unsigned uid = 0, gid = 0;
    *user = (struct user){.home = "/", .shell = "/bin/sh"};
    if (strlen(text) >= sizeof name)
        return -ENOENT;
    strcpy(name, text);
    char *colon = strchr(name, ':');
    if (colon)
        *colon++ = '\0';
    bool by_uid = number(name, &uid);
    if ((colon && (!by_uid || !number(colon, &gid))))
        return -ENOENT;
    bool known = find_passwd(user, name, uid, by_uid);
    if (!known && !by_uid)
        return -ENOENT;
    if (known) {
        find_groups(user);
    } else { /* a number is a user without being one of the list */
        user->uid = uid;
        user->gid = uid;
        snprintf(user->name, sizeof user->name, "%s", name);
    }
    if (colon)
        user->gid = gid;
    return 0;
}
