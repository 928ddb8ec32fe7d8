/*
 * A guest that was copied while it ran becomes another one: the kernel's random numbers are seeded, network cards get the addresses that their devices have now, the host and /etc/machine-id
 * other names. All of it that can be done is done; what cannot be is told.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <linux/random.h>
#include <net/if.h>
#include <net/if_arp.h>

#include "agent/agent.h"

#define RANDOM_RESEED _IO('R', 0x07) /* RNDRESEEDCRNG, Linux 4.14 */

static bool seed_random(const uint8_t seed[AGENT_SEED_BYTES])
{
    struct {
        struct rand_pool_info info;
        uint8_t bytes[AGENT_SEED_BYTES];
    } pool = {.info = {.entropy_count = AGENT_SEED_BYTES * 8, .buf_size = AGENT_SEED_BYTES}};
    memcpy(pool.info.buf, seed, AGENT_SEED_BYTES);
    int fd = open("/dev/urandom", O_RDWR | O_CLOEXEC);
    bool done = fd >= 0 && ioctl(fd, RNDADDENTROPY, &pool) == 0 && ioctl(fd, RANDOM_RESEED) == 0;
    if (fd >= 0)
        close(fd);
    explicit_bzero(&pool, sizeof pool);
    return done;
}

/* A text in a file that is there. */
static bool replace_file(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_TRUNC | O_CLOEXEC);
    if (fd < 0)
        return errno == ENOENT;
    bool done = write(fd, text, strlen(text)) == (ssize_t)strlen(text);
    return close(fd) == 0 && done;
}

static bool set_address(const char *interface, const uint8_t mac[6])
{
    struct ifreq request = {.ifr_hwaddr.sa_family = ARPHRD_ETHER};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    snprintf(request.ifr_name, sizeof request.ifr_name, "%s", interface);
    memcpy(request.ifr_hwaddr.sa_data, mac, 6);
    bool done = fd >= 0 && ioctl(fd, SIOCSIFHWADDR, &request) == 0;
    if (fd >= 0)
        close(fd);
    return done;
}

/* The first name in a directory that begins so. */
static bool find_in(const char *path, const char *prefix, char *name, size_t size)
{
    DIR *entries = opendir(path);
    bool found = false;
    for (struct dirent *entry; entries && !found && (entry = readdir(entries));)
        if (entry->d_name[0] != '.' && strncmp(entry->d_name, prefix, strlen(prefix)) == 0)
            found = snprintf(name, size, "%s", entry->d_name) < (int)size;
    if (entries)
        closedir(entries);
    return found;
}

/* True also when nothing of the guest drives the card. */
static bool set_card(unsigned slot, const uint8_t mac[6])
{
    char path[512], device[64], interface[IFNAMSIZ];
    snprintf(path, sizeof path, "/sys/bus/pci/devices/0000:00:%02x.0", slot);
    if (!find_in(path, "virtio", device, sizeof device))
        return true;
    snprintf(path, sizeof path, "/sys/bus/pci/devices/0000:00:%02x.0/%s/net", slot, device);
    return !find_in(path, "", interface, sizeof interface) || set_address(interface, mac);
}

/* An empty one is to be filled at the next boot and stays so. */
static bool set_machine_id(const uint8_t id[16])
{
    char text[34], old[2] = "";
    int fd = open("/etc/machine-id", O_RDONLY | O_CLOEXEC);
    bool empty = fd < 0 || read(fd, old, 1) != 1;
    if (fd >= 0)
        close(fd);
    for (unsigned i = 0; i < 16; i++)
        snprintf(text + 2 * i, 3, "%02x", id[i]);
    strcpy(text + 32, "\n");
    return empty || replace_file("/etc/machine-id", text);
}

void serve_identity(struct session *session, const struct agent_frame *frame)
{
    struct agent_identity identity;
    char line[sizeof identity.name + 1], trouble[160] = "";
    if (agent_identity_parse(&identity, frame->body, frame->size_bytes))
        return;
    snprintf(line, sizeof line, "%s\n", identity.name);
    if (!seed_random(identity.seed))
        strcat(trouble, " the random numbers' seed,");
    for (unsigned i = 0; i < identity.card_count; i++)
        if (!set_card(identity.card[i].slot, identity.card[i].mac) && !strstr(trouble, "network"))
            strcat(trouble, " the network cards' addresses,");
    if (sethostname(identity.name, strlen(identity.name)) || !replace_file("/etc/hostname", line))
        strcat(trouble, " the host's name,");
    if (!set_machine_id(identity.machine_id))
        strcat(trouble, " /etc/machine-id,");
    if (!trouble[0]) {
        session_send(session, AGENT_DONE, NULL, 0);
        return;
    }
    trouble[strlen(trouble) - 1] = '\0';
    session_fail(session, 1, "cannot change%s", trouble);
}
