/*
 * Nodes: the files that the guest knows by number.
 *
 * A node is found on the host by its parent's descriptor and its name, one component at a time and without following links, and it is what it was only while
 * device, inode and time of birth are the same. Its O_PATH descriptor is opened when a call needs it and closed again when there are many,
 * those used least lately first. A file that loses its name keeps its descriptor instead.
 * Invariants: a node is freed when the guest holds it no more (`lookups`) and nothing here does (`uses`); a parent outlives its children. Nodes in `recent` have a
 * descriptor, no pins and a parent.
 * Threading: fs->lock, which is not held while files are opened.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <linux/openat2.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "fs/fs_priv.h"
#include "util/log.h"
#include "util/sandbox_rules.h"

SANDBOX_ALLOW(IN_SHARE, openat2);
SANDBOX_ALLOW(IN_SHARE, openat);
SANDBOX_ALLOW(IN_SHARE, read); /* /proc/sys/vm/overcommit_memory, by the C library's free(), where a share has it */
SANDBOX_ALLOW(IN_SHARE, statx);
SANDBOX_ALLOW(IN_SHARE, fstatfs);
SANDBOX_ALLOW(IN_SHARE | IN_LOOP | IN_VCPU, close); /* a driver's reset gives everything up on the thread that asks for it */

#define STATX_WANTED (STATX_BASIC_STATS | STATX_BTIME)
#define HASH_FIRST 1024u
#define CLOSED_DEPTH_MAX 4096u /* ancestors that are opened for one node */

/* File systems whose files are doors into the kernel or into processes; magic numbers that <linux/magic.h> may not have are statfs(2)'s. */
static const uint32_t refused_types[] = {PROC_SUPER_MAGIC, SYSFS_MAGIC, DEBUGFS_MAGIC, TRACEFS_MAGIC, SECURITYFS_MAGIC, CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC,
                                         BPF_FS_MAGIC, DEVPTS_SUPER_MAGIC, EFIVARFS_MAGIC, SELINUX_MAGIC, SMACK_MAGIC, BINFMTFS_MAGIC, NSFS_MAGIC, 0x19800202 /* mqueue */,
                                         0x62656570 /* configfs */, 0x65735543 /* fusectl */};
static const uint32_t remote_types[] = {NFS_SUPER_MAGIC, SMB_SUPER_MAGIC, CIFS_SUPER_MAGIC, SMB2_SUPER_MAGIC, V9FS_MAGIC, FUSE_SUPER_MAGIC, AFS_SUPER_MAGIC, AFS_FS_MAGIC,
                                        CODA_SUPER_MAGIC, NCP_SUPER_MAGIC, CEPH_SUPER_MAGIC};

static bool listed(const uint32_t *types, size_t count, uint32_t type)
{
    for (size_t i = 0; i < count; i++) {
        if (types[i] == type)
            return true;
    }
    return false;
}

/* ---- what the host says ---- */

struct fs_identity fs_identity_of(const struct statx *stat)
{
    return (struct fs_identity){
        .device = makedev(stat->stx_dev_major, stat->stx_dev_minor),
        .inode = stat->stx_ino,
        .birth_ns = stat->stx_mask & STATX_BTIME ? (uint64_t)stat->stx_btime.tv_sec * 1000000000u + stat->stx_btime.tv_nsec : 0,
    };
}

static bool same_file(const struct fs_identity *a, const struct fs_identity *b)
{
    return a->device == b->device && a->inode == b->inode && a->birth_ns == b->birth_ns;
}

int fs_statx(int fd, const char *name, struct statx *stat)
{
    return statx(fd, name, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT | (*name ? 0 : AT_EMPTY_PATH), STATX_WANTED, stat) < 0 ? -errno : 0;
}

/* One name in a directory, whatever it is; a link itself, never where it leads. */
static int open_name(int directory, const char *name)
{
    struct open_how how = {.flags = O_PATH | O_NOFOLLOW | O_CLOEXEC, .resolve = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS};
    int fd = (int)syscall(SYS_openat2, directory, name, &how, sizeof(how));

    if (fd < 0 && errno == ENOSYS) /* before Linux 5.6: a single name that is not followed cannot lead elsewhere either */
        fd = openat(directory, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    return fd < 0 ? -errno : fd;
}

/* Entries are only added, so this needs no lock. */
static const struct fs_device *find_device(const struct fs *fs, uint64_t device)
{
    unsigned count = atomic_load_explicit(&fs->device_count, memory_order_acquire);

    for (unsigned i = 0; i < count; i++) {
        if (fs->device[i].device == device)
            return &fs->device[i];
    }
    return NULL;
}

const struct fs_device *fs_device_of(struct fs *fs, int fd, uint64_t device)
{
    const struct fs_device *found = find_device(fs, device);
    struct statfs about;

    if (found || fd < 0)
        return found;
    if (fstatfs(fd, &about) < 0)
        return NULL;
    pthread_mutex_lock(&fs->lock);
    found = find_device(fs, device);
    if (!found && fs->device_count < FS_DEVICES_MAX) {
        found = &fs->device[fs->device_count];
        fs->device[fs->device_count] = (struct fs_device){
            .device = device,
            .refused = listed(refused_types, sizeof(refused_types) / sizeof(refused_types[0]), (uint32_t)about.f_type),
            .local = !listed(remote_types, sizeof(remote_types) / sizeof(remote_types[0]), (uint32_t)about.f_type),
        };
        atomic_fetch_add_explicit(&fs->device_count, 1, memory_order_release);
    }
    pthread_mutex_unlock(&fs->lock);
    return found;
}

/* Inode numbers are told apart by device, because the guest sees one file system. */
uint64_t fs_shown_inode(const struct fs *fs, const struct fs_identity *identity)
{
    const struct fs_device *device = find_device(fs, identity->device);

    return device ? identity->inode ^ (uint64_t)(device - fs->device) << 48 : identity->inode;
}

/* ---- the tables; with the lock held ---- */

static unsigned hash_of(const struct fs *fs, const struct fs_identity *identity)
{
    uint64_t mix = (identity->inode ^ identity->device << 32) * 0x9E3779B97F4A7C15ull;

    return (unsigned)(mix >> 32) & (fs->hash_size - 1);
}

static struct fs_node *find_identity(const struct fs *fs, const struct fs_identity *identity)
{
    struct fs_node *node = fs->hash[hash_of(fs, identity)];

    while (node && !same_file(&node->identity, identity))
        node = node->hash_next;
    return node;
}

static void hash_add(struct fs *fs, struct fs_node *node)
{
    struct fs_node **head = &fs->hash[hash_of(fs, &node->identity)];

    node->hash_next = *head;
    *head = node;
}

static void hash_remove(struct fs *fs, struct fs_node *node)
{
    struct fs_node **link = &fs->hash[hash_of(fs, &node->identity)];

    while (*link && *link != node)
        link = &(*link)->hash_next;
    if (*link)
        *link = node->hash_next;
}

static void hash_grow(struct fs *fs)
{
    unsigned old_size = fs->hash_size;
    struct fs_node **old = fs->hash, **grown = calloc(old_size * 2, sizeof(*grown));

    if (!grown)
        return; /* longer chains */
    fs->hash = grown;
    fs->hash_size = old_size * 2;
    for (unsigned i = 0; i < old_size; i++) {
        while (old[i]) {
            struct fs_node *node = old[i];

            old[i] = node->hash_next;
            hash_add(fs, node);
        }
    }
    free(old);
}

static void recent_remove(struct fs *fs, struct fs_node *node)
{
    if (node->in_recent)
        TAILQ_REMOVE(&fs->recent, node, recent);
    node->in_recent = false;
}

static void recent_add(struct fs *fs, struct fs_node *node)
{
    recent_remove(fs, node);
    if (node->fd < 0 || node->pins || !node->parent)
        return;
    TAILQ_INSERT_TAIL(&fs->recent, node, recent);
    node->in_recent = true;
}

static void node_close(struct fs *fs, struct fs_node *node)
{
    recent_remove(fs, node);
    if (node->fd < 0)
        return;
    close(node->fd);
    node->fd = -1;
    fs->fd_count--;
}

/* Gives the node its descriptor, at the expense of others when there are too many. */
static int node_install(struct fs *fs, struct fs_node *node, int fd)
{
    if (node->fd >= 0) {
        close(fd);
        return 0;
    }
    while (fs->fd_count >= fs->fd_max) {
        struct fs_node *oldest = TAILQ_FIRST(&fs->recent);

        if (!oldest) {
            close(fd);
            return -ENFILE;
        }
        node_close(fs, oldest);
    }
    node->fd = fd;
    fs->fd_count++;
    recent_add(fs, node);
    return 0;
}

static uint64_t bytes_of(const struct fs_node *node)
{
    return sizeof(*node) + (node->name ? strlen(node->name) + 1 : 0);
}

static void node_free(struct fs *fs, struct fs_node *node)
{
    node_close(fs, node);
    hash_remove(fs, node);
    fs_slots_remove(&fs->nodes, node->id);
    fs->node_bytes -= bytes_of(node);
    fs->node_count--;
    free(node->name);
    free(node);
}

/* Frees the node if nobody needs it, and then its parents. */
static void node_release(struct fs *fs, struct fs_node *node)
{
    while (node && node->lookups == 0 && node->uses == 0) {
        struct fs_node *parent = node->parent;

        node_free(fs, node);
        if (parent)
            parent->uses--;
        node = parent;
    }
}

static void set_place(struct fs *fs, struct fs_node *node, struct fs_node *parent, const char *name)
{
    struct fs_node *old = node->parent;
    char *copy = name ? strdup(name) : NULL;

    if (name && !copy)
        return; /* it keeps its old place, and is not found there when its descriptor was closed */
    for (struct fs_node *up = node->uses ? parent : NULL; up; up = up->parent) {
        if (up == node) { /* the root, or the host moves directories meanwhile */
            free(copy);
            return;
        }
    }
    fs->node_bytes -= bytes_of(node);
    free(node->name);
    node->name = copy;
    node->parent = parent;
    fs->node_bytes += bytes_of(node);
    if (parent)
        parent->uses++;
    recent_add(fs, node);
    if (old) {
        old->uses--;
        node_release(fs, old);
    }
}

static struct fs_node *node_create(struct fs *fs, const struct fs_identity *identity, uint32_t type, uint64_t id)
{
    struct fs_node *node;

    if (fs->node_bytes > FS_NODE_BYTES_MAX)
        return NULL;
    node = calloc(1, sizeof(*node));
    if (!node)
        return NULL;
    node->identity = *identity;
    node->type = type;
    node->fd = -1;
    if ((id ? fs_slots_add_as(&fs->nodes, &node->id, id) : fs_slots_add(&fs->nodes, &node->id)) < 0) {
        free(node);
        return NULL;
    }
    if (fs->node_count >= fs->hash_size)
        hash_grow(fs);
    hash_add(fs, node);
    fs->node_count++;
    fs->node_bytes += bytes_of(node);
    return node;
}

/* ---- opening ---- */

/* The descriptor of a name that must be that file. */
static int open_checked(int directory, const char *name, const struct fs_identity *identity)
{
    struct fs_identity found;
    struct statx stat;
    int fd = open_name(directory, name), ret;

    if (fd < 0)
        return fd == -ENOENT || fd == -ENOTDIR ? -ESTALE : fd;
    ret = fs_statx(fd, "", &stat);
    if (ret == 0) {
        found = fs_identity_of(&stat);
        if (!same_file(&found, identity))
            ret = -ESTALE;
    }
    if (ret < 0) {
        close(fd);
        return ret;
    }
    return fd;
}

/* Opens `node`, which is in use, in its parent, which is open. Gives the lock away meanwhile. */
static int open_in_parent(struct fs *fs, struct fs_node *node)
{
    struct fs_node *parent = node->parent;
    struct fs_identity identity = node->identity;
    char name[FS_NAME_BYTES_MAX + 1];
    int fd;

    strcpy(name, node->name); /* names are never longer */
    node->uses++;
    parent->uses++;
    parent->pins++;
    recent_remove(fs, parent);
    pthread_mutex_unlock(&fs->lock);
    fd = open_checked(parent->fd, name, &identity);
    pthread_mutex_lock(&fs->lock);
    parent->pins--;
    recent_add(fs, parent);
    if (fd >= 0)
        fd = node_install(fs, node, fd);
    parent->uses--;
    node_release(fs, parent);
    node->uses--;
    return fd;
}

/* Makes sure of the node's descriptor: from the lowest ancestor that has one downwards. The lock is held, but not throughout; the node is in use. */
static int node_open(struct fs *fs, struct fs_node *node)
{
    for (unsigned round = 0; round < 2 * CLOSED_DEPTH_MAX; round++) {
        struct fs_node *closed = node;
        unsigned depth = 0;
        int ret;

        if (node->fd >= 0)
            return 0;
        while (closed->parent && closed->parent->fd < 0 && depth++ < CLOSED_DEPTH_MAX)
            closed = closed->parent;
        if (!closed->parent || depth > CLOSED_DEPTH_MAX)
            return -ESTALE;
        closed->uses++;
        ret = open_in_parent(fs, closed);
        closed->uses--;
        if (closed != node)
            node_release(fs, closed);
        if (ret < 0)
            return ret;
    }
    return -ESTALE;
}

/* ---- for calls ---- */

static struct fs_node *find_held(const struct fs *fs, uint64_t id)
{
    struct fs_node *node = fs_slots_find(&fs->nodes, id);

    return node && (node->lookups || node == fs->root) ? node : NULL;
}

int fs_node_get(struct fs *fs, uint64_t id, struct fs_node **node)
{
    pthread_mutex_lock(&fs->lock);
    *node = find_held(fs, id);
    if (*node)
        (*node)->uses++;
    pthread_mutex_unlock(&fs->lock);
    return *node ? 0 : -ESTALE;
}

void fs_node_put(struct fs *fs, struct fs_node *node)
{
    if (!node)
        return;
    pthread_mutex_lock(&fs->lock);
    node->uses--;
    node_release(fs, node);
    pthread_mutex_unlock(&fs->lock);
}

/* With the lock; `node` gets one more use and a pin, or nothing. */
static int ref_take(struct fs *fs, struct fs_node *node, struct fs_ref *ref)
{
    int ret;

    *ref = (struct fs_ref){NULL, -1};
    node->uses++;
    ret = node_open(fs, node);
    if (ret < 0) {
        node->uses--;
        node_release(fs, node);
        return ret;
    }
    node->pins++;
    recent_remove(fs, node);
    *ref = (struct fs_ref){node, node->fd};
    return 0;
}

int fs_ref_take(struct fs *fs, struct fs_node *node, struct fs_ref *ref)
{
    int ret;

    pthread_mutex_lock(&fs->lock);
    ret = ref_take(fs, node, ref);
    pthread_mutex_unlock(&fs->lock);
    return ret;
}

int fs_ref_get(struct fs *fs, uint64_t id, struct fs_ref *ref)
{
    struct fs_node *node;
    int ret = -ESTALE;

    *ref = (struct fs_ref){NULL, -1};
    pthread_mutex_lock(&fs->lock);
    node = find_held(fs, id);
    if (node)
        ret = ref_take(fs, node, ref);
    pthread_mutex_unlock(&fs->lock);
    return ret;
}

void fs_ref_put(struct fs *fs, struct fs_ref *ref)
{
    if (!ref->node)
        return;
    pthread_mutex_lock(&fs->lock);
    ref->node->pins--;
    recent_add(fs, ref->node);
    ref->node->uses--;
    node_release(fs, ref->node);
    pthread_mutex_unlock(&fs->lock);
    *ref = (struct fs_ref){NULL, -1};
}

/* Attributes do not need the node's own descriptor: its parent's will do. */
int fs_node_stat(struct fs *fs, struct fs_node *node, struct statx *stat)
{
    char name[FS_NAME_BYTES_MAX + 1] = "";
    struct fs_identity found;
    struct fs_ref ref;
    int ret;

    pthread_mutex_lock(&fs->lock);
    if (node->fd < 0 && node->parent) {
        strcpy(name, node->name);
        ret = ref_take(fs, node->parent, &ref);
    } else {
        ret = ref_take(fs, node, &ref);
    }
    pthread_mutex_unlock(&fs->lock);
    if (ret < 0)
        return ret;
    ret = fs_statx(ref.fd, name, stat);
    fs_ref_put(fs, &ref);
    if (ret < 0)
        return ret == -ENOENT ? -ESTALE : ret;
    found = fs_identity_of(stat);
    return same_file(&found, &node->identity) ? 0 : -ESTALE;
}

/* ---- names ---- */

/* With the lock: the node of a file, found or made; its place is the one where it was seen last. No parent: a file that never had a name. */
static struct fs_node *node_at(struct fs *fs, const struct fs_identity *identity, uint32_t type, struct fs_node *parent, const char *name)
{
    struct fs_node *node = find_identity(fs, identity);

    if (!node)
        node = node_create(fs, identity, type, 0);
    if (node && node != fs->root && parent && (node->parent != parent || strcmp(node->name, name)))
        set_place(fs, node, parent, name);
    if (node && node != fs->root && parent && !node->name && node->fd < 0) { /* a new one without memory for its name */
        node_release(fs, node);
        return NULL;
    }
    return node;
}

int fs_node_enter(struct fs *fs, struct fs_node *parent, const char *name, uint32_t epoch, const struct statx *stat, int fd, struct fs_node **out)
{
    struct fs_identity identity = fs_identity_of(stat);
    struct fs_node *node;

    pthread_mutex_lock(&fs->lock);
    node = fs->epoch == epoch ? node_at(fs, &identity, stat->stx_mode & S_IFMT, parent, name) : NULL;
    if (node)
        node->lookups++;
    if (node && fd >= 0)
        (void)node_install(fs, node, fd); /* without: opened by name when it is needed */
    else if (fd >= 0)
        close(fd);
    if (node && node->in_recent)
        recent_add(fs, node);
    pthread_mutex_unlock(&fs->lock);
    *out = node;
    return node ? 0 : -ENFILE;
}

int fs_node_lookup(struct fs *fs, const struct fs_ref *parent, const char *name, uint32_t epoch, struct fs_node **out, struct statx *stat)
{
    struct fs_identity identity;
    const struct fs_device *device;
    int fd = -1, ret = fs_statx(parent->fd, name, stat);

    if (ret < 0)
        return ret;
    identity = fs_identity_of(stat);
    device = fs_device_of(fs, -1, identity.device);
    /* A file that says nothing of its birth is known by its descriptor; a device is met for the first time through one. */
    if (!device || identity.birth_ns == 0) {
        fd = open_name(parent->fd, name);
        ret = fd < 0 ? fd : fs_statx(fd, "", stat);
        if (ret == 0) {
            identity = fs_identity_of(stat);
            device = fs_device_of(fs, fd, identity.device);
        }
    }
    if (ret == 0 && (!device || device->refused))
        ret = -EACCES;
    if (ret < 0) {
        if (fd >= 0)
            close(fd);
        return ret;
    }
    return fs_node_enter(fs, parent->node, name, epoch, stat, fd, out);
}

void fs_node_hold(struct fs *fs, const struct fs_ref *parent, const char *name, struct fs_ref *held)
{
    struct fs_identity identity;
    struct fs_node *node;
    struct statx stat;
    int fd;

    *held = (struct fs_ref){NULL, -1};
    if (fs_statx(parent->fd, name, &stat) < 0)
        return;
    identity = fs_identity_of(&stat);
    pthread_mutex_lock(&fs->lock);
    node = find_identity(fs, &identity);
    if (node && node->fd < 0) {
        node->uses++;
        pthread_mutex_unlock(&fs->lock);
        fd = open_checked(parent->fd, name, &identity);
        pthread_mutex_lock(&fs->lock);
        if (fd >= 0)
            (void)node_install(fs, node, fd);
        node->uses--;
    }
    if (node && ref_take(fs, node, held) < 0) {
        /* It cannot be opened: then it ends with its name, and still has to lose that. */
        node->uses++;
        held->node = node;
        node->pins++;
    }
    pthread_mutex_unlock(&fs->lock);
}

void fs_node_unnamed(struct fs *fs, struct fs_node *node, const struct fs_node *parent, const char *name)
{
    pthread_mutex_lock(&fs->lock);
    if (node->parent == parent && node->name && !strcmp(node->name, name))
        set_place(fs, node, NULL, NULL);
    pthread_mutex_unlock(&fs->lock);
}

void fs_node_named(struct fs *fs, struct fs_node *node, struct fs_node *parent, const char *name)
{
    pthread_mutex_lock(&fs->lock);
    set_place(fs, node, parent, name);
    pthread_mutex_unlock(&fs->lock);
}

void fs_node_forget(struct fs *fs, uint64_t id, uint64_t count)
{
    struct fs_node *node;

    pthread_mutex_lock(&fs->lock);
    node = find_held(fs, id);
    if (node && node != fs->root) {
        node->lookups -= count < node->lookups ? count : node->lookups;
        node_release(fs, node);
    }
    pthread_mutex_unlock(&fs->lock);
}

/* ---- all of them ---- */

int fs_nodes_create(struct fs *fs, int root_fd, const struct statx *stat)
{
    struct fs_identity identity = fs_identity_of(stat);

    TAILQ_INIT(&fs->recent);
    fs->hash = calloc(HASH_FIRST, sizeof(*fs->hash));
    if (!fs->hash)
        return -ENOMEM;
    fs->hash_size = HASH_FIRST;
    fs->root = node_create(fs, &identity, S_IFDIR, 0);
    if (!fs->root)
        return -ENOMEM;
    fs->root->uses = 1;
    fs->root->fd = root_fd;
    fs->fd_count = 1;
    return 0;
}

void fs_nodes_drop(struct fs *fs)
{
    for (uint32_t i = 0; i < fs->nodes.capacity; i++) {
        struct fs_node *node = (struct fs_node *)fs->nodes.item[i];

        if (!node || node == fs->root)
            continue;
        node->lookups = 0;
        node_release(fs, node);
    }
}

void fs_nodes_destroy(struct fs *fs)
{
    if (fs->root) {
        fs_nodes_drop(fs);
        fs->root->uses = 0;
        node_release(fs, fs->root);
    }
    fs_slots_clear(&fs->nodes);
    free(fs->hash);
}

/* ---- state ---- */

static void node_fields(struct state_io *io, struct fs_node *node, uint64_t *parent, char *name)
{
    uint32_t name_bytes = node->name ? (uint32_t)strlen(node->name) : 0;

    state_u64(io, &node->id);
    state_u64(io, parent);
    state_u64(io, &node->lookups);
    state_u32(io, &node->type);
    state_u64(io, &node->identity.device);
    state_u64(io, &node->identity.inode);
    state_u64(io, &node->identity.birth_ns);
    state_buffer(io, name, &name_bytes, FS_NAME_BYTES_MAX);
    name[name_bytes] = '\0';
}

/* Parents first, so that loading finds them, and no circle can be written down. */
static void save_node(struct fs *fs, struct fs_node *node, struct state_io *io)
{
    while (!node->saved) {
        struct fs_node *top = node;
        uint64_t parent = 0;
        char name[FS_NAME_BYTES_MAX + 1] = "";

        while (top->parent && top->parent != fs->root && !top->parent->saved)
            top = top->parent;
        if (top->parent)
            parent = top->parent->id;
        if (top->name)
            strcpy(name, top->name);
        node_fields(io, top, &parent, name);
        top->saved = true;
    }
}

/* What the name leads to now. The host may have another directory under this path, a copy for example: then the file of that name and kind is taken for the one saved. */
static int identify(struct fs *fs, struct fs_node *parent, const char *name, struct fs_node *saved)
{
    struct fs_ref ref;
    struct statx stat;
    int fd, ret = fs_ref_take(fs, parent, &ref);

    if (ret < 0)
        return ret;
    fd = open_name(ref.fd, name);
    fs_ref_put(fs, &ref);
    if (fd < 0)
        return fd;
    ret = fs_statx(fd, "", &stat);
    if (ret == 0) {
        const struct fs_device *device = fs_device_of(fs, fd, fs_identity_of(&stat).device);

        if ((stat.stx_mode & S_IFMT) != saved->type || !device || device->refused)
            ret = -ESTALE;
        else
            saved->identity = fs_identity_of(&stat);
    }
    close(fd);
    return ret;
}

static void load_node(struct fs *fs, struct state_io *io, unsigned *lost)
{
    struct fs_node saved = {0}, *parent, *node;
    uint64_t parent_id;
    char name[FS_NAME_BYTES_MAX + 1];
    bool found;

    node_fields(io, &saved, &parent_id, name);
    if (state_failed(io))
        return;
    parent = parent_id ? fs_slots_find(&fs->nodes, parent_id) : NULL;
    if ((parent_id && (!parent || !S_ISDIR(parent->type) || !fs_name_valid(name))) || (!parent_id && *name)) {
        state_fail(io, "a file's place is impossible");
        return;
    }
    found = parent && identify(fs, parent, name, &saved) == 0;
    pthread_mutex_lock(&fs->lock);
    node = fs_slots_find(&fs->nodes, saved.id) ? NULL : node_create(fs, &saved.identity, saved.type, saved.id);
    if (node) {
        node->lookups = saved.lookups;
        node->uses++;
        node->saved = true;
        if (parent)
            set_place(fs, node, parent, name);
    }
    pthread_mutex_unlock(&fs->lock);
    if (!node)
        state_fail(io, "too many files, or one twice");
    *lost += !found;
}

void fs_nodes_state(struct fs *fs, struct state_io *io)
{
    uint32_t count = fs->node_count - 1;
    unsigned lost = 0;

    state_u64(io, &fs->nodes.sequence);
    state_u32(io, &count);
    if (state_loading(io)) {
        for (uint32_t i = 0; i < count && !state_failed(io); i++)
            load_node(fs, io, &lost);
        fs_slots_settle(&fs->nodes);
        if (lost)
            log_warning("share %s: %u files that the guest knows are not there any more; it will see ESTALE", fs->path, lost);
        return;
    }
    for (uint32_t i = 0; i < fs->nodes.capacity; i++) {
        struct fs_node *node = (struct fs_node *)fs->nodes.item[i];

        if (node && node != fs->root)
            save_node(fs, node, io);
    }
    for (uint32_t i = 0; i < fs->nodes.capacity; i++) {
        if (fs->nodes.item[i])
            ((struct fs_node *)fs->nodes.item[i])->saved = false;
    }
}

void fs_nodes_loaded(struct fs *fs)
{
    pthread_mutex_lock(&fs->lock);
    for (uint32_t i = 0; i < fs->nodes.capacity; i++) {
        struct fs_node *node = (struct fs_node *)fs->nodes.item[i];

        if (!node || !node->saved)
            continue;
        node->saved = false;
        node->uses--;
        node_release(fs, node);
    }
    pthread_mutex_unlock(&fs->lock);
}
