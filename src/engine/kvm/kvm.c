/*
 * The KVM engine: guest code runs on the processor itself under the host's hardware virtualization, through /dev/kvm. docs/kvm.md says what is used and what was tried where.
 *
 * This file: what the host must have, the virtual machine's descriptor, memory slots (one for each of PhysMap's ranges) and the dirty log. The list of slots mirrors KVM's.
 * Threading: slots and log under `lock`, from any thread; creation on one thread before vCPUs run.
 */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cpuid.h>

#include "engine/kvm/kvm_priv.h"
#include "util/log.h"

#define DEVICE "/dev/kvm"
#define MSR_INDEX_MAX 4096u
#define TSS_GPA 0xFFFBD000ull /* three pages for real mode on old processors, in the hole below 4 GiB; the identity map is the page before */

/* ---- what the host has ---- */

static const struct {
    int number;
    const char *name;
} needed[] = {
#define NEEDED(name) {KVM_CAP_##name, #name}
    NEEDED(USER_MEMORY), NEEDED(READONLY_MEM), NEEDED(IMMEDIATE_EXIT), NEEDED(EXT_CPUID),      NEEDED(MP_STATE),
    NEEDED(VCPU_EVENTS), NEEDED(DEBUGREGS),    NEEDED(XSAVE),          NEEDED(XCRS),           NEEDED(USER_NMI),
    NEEDED(SREGS2),      NEEDED(XSAVE2),       NEEDED(VCPU_ATTRIBUTES), NEEDED(X86_USER_SPACE_MSR), NEEDED(X86_MSR_FILTER),
};

static int open_device(struct error *err)
{
    int fd = open(DEVICE, O_RDWR | O_CLOEXEC);
    if (fd >= 0)
        return fd;
    switch (errno) {
    case ENOENT:
        return error_set(err, -ENODEV, "engine \"kvm\" needs " DEVICE ", which does not exist: is the kernel's module loaded, and the device given to this container?");
    case EACCES:
    case EPERM:
        return error_set(err, -EACCES, "engine \"kvm\" needs to read and write " DEVICE ", which you may not: join the group that owns it (often \"kvm\")");
    default:
        return error_set(err, -errno, "engine \"kvm\" needs " DEVICE ": %s", strerror(errno));
    }
}

static int check_device(int fd, struct error *err)
{
    int version = ioctl(fd, KVM_GET_API_VERSION, 0);
    if (version != KVM_API_VERSION)
        return error_set(err, -ENOTSUP, "engine \"kvm\" needs version %d of the interface of " DEVICE ", not %d", KVM_API_VERSION, version);
    for (unsigned n = 0; n < sizeof needed / sizeof *needed; n++)
        if (ioctl(fd, KVM_CHECK_EXTENSION, needed[n].number) <= 0)
            return error_set(err, -ENOTSUP, "engine \"kvm\" needs a newer kernel (Linux 5.17): " DEVICE " lacks KVM_CAP_%s", needed[n].name);
    return 0;
}

static int kvm_probe(struct error *err)
{
    int fd = open_device(err);
    if (fd < 0)
        return fd;
    int r = check_device(fd, err);
    close(fd);
    return r;
}

/* There are kernels whose /dev/kvm emulates most of a guest's instructions: it works, thousands of times slower than the other engines. */
static int kvm_worthwhile(struct error *err)
{
    unsigned eax, ebx, ecx = 0, edx;
    bool vmx = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && ecx >> 5 & 1;
    ecx = 0;
    bool svm = __get_cpuid(0x80000001, &eax, &ebx, &ecx, &edx) && ecx >> 2 & 1;
    return vmx || svm ? 0 : error_set(err, -ENODEV, "the processor offers no hardware virtualization (neither VMX nor SVM)");
}

/* ---- memory ---- */

static int slot_tell(struct engine *e, unsigned n, bool there)
{
    const struct physmap_range *range = &e->slots[n].range;
    struct kvm_userspace_memory_region region = {
        .slot = n,
        .flags = (range->rom ? KVM_MEM_READONLY : 0) | (e->logging && !range->rom ? KVM_MEM_LOG_DIRTY_PAGES : 0),
        .guest_phys_addr = range->gpa,
        .memory_size = there ? range->length_bytes : 0,
        .userspace_addr = (uintptr_t)range->host,
    };
    int r = kvm_call(e->vm, KVM_SET_USER_MEMORY_REGION, &region);
    if (r)
        log_error("kvm: memory at 0x%llx (%llu bytes): %s", (unsigned long long)range->gpa, (unsigned long long)range->length_bytes, strerror(-r));
    return r;
}

static bool ranges_equal(const struct physmap_range *a, const struct physmap_range *b)
{
    return a->gpa == b->gpa && a->length_bytes == b->length_bytes && a->host == b->host && a->rom == b->rom;
}

static int by_gpa(const void *a, const void *b)
{
    gpa_t x = ((const struct physmap_range *)a)->gpa, y = ((const struct physmap_range *)b)->gpa;
    return x < y ? -1 : x > y;
}

/* What is no longer there goes first: KVM's slots may not overlap. kept[i]: ranges[i] has a slot already. */
static int slots_remove(struct engine *e, const struct physmap_range *ranges, unsigned count, bool *kept)
{
    int r = 0;
    for (unsigned n = 0; n < e->slot_count && r == 0; n++) {
        struct memory_slot *slot = &e->slots[n];
        const struct physmap_range *same = slot->used ? bsearch(&slot->range, ranges, count, sizeof *ranges, by_gpa) : NULL;
        if (same && ranges_equal(&slot->range, same)) {
            kept[same - ranges] = true;
        } else if (slot->used) {
            r = slot_tell(e, n, false);
            slot->used = r != 0;
        }
    }
    return r;
}

static int slots_add(struct engine *e, const struct physmap_range *ranges, unsigned count, const bool *kept)
{
    unsigned n = 0;
    int r = 0;
    for (unsigned i = 0; i < count && r == 0; i++) {
        if (kept[i])
            continue;
        while (e->slots[n].used) /* as many slots as ranges */
            n++;
        e->slots[n].range = ranges[i];
        r = slot_tell(e, n, true);
        e->slots[n].used = r == 0;
    }
    return r;
}

/* At least `count` slots; those that are there stay where they are. */
static int slots_reserve(struct engine *e, unsigned count)
{
    if (count <= e->slot_count)
        return 0;
    if (count > e->slots_max)
        return -ENOSPC;
    struct memory_slot *slots = realloc(e->slots, count * sizeof *slots);
    if (!slots)
        return -ENOMEM;
    memset(slots + e->slot_count, 0, (count - e->slot_count) * sizeof *slots);
    e->slots = slots;
    e->slot_count = count;
    return 0;
}

static int slots_follow(struct engine *e)
{
    pthread_mutex_lock(&e->lock);
    unsigned count = physmap_ranges(e->memory, NULL, 0);
    struct physmap_range *ranges = calloc(count, sizeof *ranges);
    bool *kept = calloc(count, sizeof *kept);
    int r = ranges && kept ? slots_reserve(e, count) : -ENOMEM;
    if (r == 0 && physmap_ranges(e->memory, ranges, count) != count)
        r = -EAGAIN; /* changed meanwhile: against the rules */
    r = r ? r : slots_remove(e, ranges, count, kept);
    r = r ? r : slots_add(e, ranges, count, kept);
    pthread_mutex_unlock(&e->lock);
    free(ranges);
    free(kept);
    return r;
}

/* Without a slot memory is a hole to the guest; nobody else is harmed. */
static void memory_changed(void *engine)
{
    int r = slots_follow(engine);
    if (r)
        log_error("kvm: the guest's memory changed, and its slots do not follow: %s", strerror(-r));
}

/* ---- the dirty log ---- */

static void mark_pages(struct engine *e, const struct physmap_range *range, const uint64_t *bits)
{
    uint64_t pages = range->length_bytes / PAGE_SIZE_BYTES;
    for (uint64_t page = 0; page < pages; page++) {
        uint64_t left = bits[page / 64] >> (page % 64);
        if (!left) {
            page |= 63;
            continue;
        }
        page += (uint64_t)__builtin_ctzll(left);
        uint64_t run = 0;
        while (page + run < pages && bits[(page + run) / 64] >> ((page + run) % 64) & 1)
            run++;
        physmap_mark_written(e->memory, range->gpa + page * PAGE_SIZE_BYTES, run * PAGE_SIZE_BYTES);
        page += run;
    }
}

/* What is read is cleared before it is marked and used, so a write in between is in the next reading. */
static int slot_collect(struct engine *e, unsigned n)
{
    const struct physmap_range *range = &e->slots[n].range;
    uint64_t pages = range->length_bytes / PAGE_SIZE_BYTES;
    uint64_t *bits = calloc((pages + 63) / 64, sizeof *bits);
    struct kvm_dirty_log log = {.slot = n, .dirty_bitmap = bits};
    struct kvm_clear_dirty_log clear = {.slot = n, .num_pages = (uint32_t)pages, .dirty_bitmap = bits};
    int r = bits ? kvm_call(e->vm, KVM_GET_DIRTY_LOG, &log) : -ENOMEM;
    if (r == 0 && e->manual_protect)
        r = kvm_call(e->vm, KVM_CLEAR_DIRTY_LOG, &clear);
    if (r == 0)
        mark_pages(e, range, bits);
    free(bits);
    return r;
}

static int set_logging(struct engine *e, bool on)
{
    int r = 0;
    e->logging = on;
    for (unsigned n = 0; n < e->slot_count && r == 0; n++) {
        if (!e->slots[n].used || e->slots[n].range.rom)
            continue;
        r = slot_tell(e, n, true);
        if (on)
            physmap_mark_written(e->memory, e->slots[n].range.gpa, e->slots[n].range.length_bytes);
    }
    return r;
}

static int kvm_collect_dirty(struct engine *e, bool on)
{
    int r = 0;
    pthread_mutex_lock(&e->lock);
    bool was = e->logging;
    for (unsigned n = 0; was && n < e->slot_count && r == 0; n++)
        if (e->slots[n].used && !e->slots[n].range.rom)
            r = slot_collect(e, n);
    if (r == 0 && on != was)
        r = set_logging(e, on);
    pthread_mutex_unlock(&e->lock);
    return r;
}

/* ---- life ---- */

static void kvm_destroy(struct engine *e)
{
    physmap_ranges_watch(e->memory, NULL, NULL);
    free(e->slots);
    if (e->vm >= 0)
        close(e->vm);
    if (e->kvm >= 0)
        close(e->kvm);
    pthread_mutex_destroy(&e->lock);
    free(e);
}

/* Which of the MSRs that not every host has, and what it says of the processor's weaknesses (IA32_ARCH_CAPABILITIES). */
static void find_msrs(struct engine *e)
{
    struct kvm_msr_list *list = calloc(1, sizeof *list + MSR_INDEX_MAX * sizeof *list->indices);
    if (!list)
        return;
    list->nmsrs = MSR_INDEX_MAX;
    if (kvm_call(e->kvm, KVM_GET_MSR_INDEX_LIST, list))
        list->nmsrs = 0;
    for (unsigned n = 0; n < list->nmsrs; n++) {
        e->has_spec_ctrl |= list->indices[n] == 0x48;
        e->has_tsc_aux |= list->indices[n] == 0xC0000103;
    }
    free(list);
    struct {
        struct kvm_msrs header;
        struct kvm_msr_entry entry;
    } one = {.header.nmsrs = 1, .entry.index = 0x10A};
    if (ioctl(e->kvm, KVM_GET_MSRS, &one) == 1)
        e->arch_capabilities = one.entry.data;
}

static int create_machine(struct engine *e, struct error *err)
{
    e->vm = ioctl(e->kvm, KVM_CREATE_VM, 0);
    if (e->vm < 0)
        return error_set(err, -errno, DEVICE " makes no virtual machine: %s", strerror(errno));
    int run = ioctl(e->kvm, KVM_GET_VCPU_MMAP_SIZE, 0), xsave = ioctl(e->vm, KVM_CHECK_EXTENSION, KVM_CAP_XSAVE2);
    e->run_bytes = run > 0 ? (size_t)run : sizeof(struct kvm_run);
    e->xsave_bytes = xsave > (int)sizeof(struct kvm_xsave) ? (size_t)xsave : sizeof(struct kvm_xsave);
    int slots = ioctl(e->vm, KVM_CHECK_EXTENSION, KVM_CAP_NR_MEMSLOTS);
    e->slots_max = slots > 0 ? (unsigned)slots : 32;
    find_msrs(e);
    /* Where KVM has no use for them these do nothing. */
    uint64_t identity = TSS_GPA - PAGE_SIZE_BYTES;
    (void)kvm_call(e->vm, KVM_SET_IDENTITY_MAP_ADDR, &identity);
    (void)ioctl(e->vm, KVM_SET_TSS_ADDR, (unsigned long)TSS_GPA);
    int manual = ioctl(e->vm, KVM_CHECK_EXTENSION, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
    struct kvm_enable_cap protect = {.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, .args = {KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE}};
    e->manual_protect = manual > 0 && kvm_call(e->vm, KVM_ENABLE_CAP, &protect) == 0;
    int r = kvm_kick_handler_install();
    physmap_ranges_watch(e->memory, memory_changed, e);
    r = r ? r : slots_follow(e);
    return r ? error_set(err, r, DEVICE " cannot take the guest's memory: %s", strerror(-r)) : 0;
}

static int kvm_create(struct engine **out, struct physmap *memory, struct error *err)
{
    struct engine *e = calloc(1, sizeof *e);
    if (!e)
        return error_set(err, -ENOMEM, "out of memory");
    e->memory = memory;
    e->vm = -1;
    pthread_mutex_init(&e->lock, NULL);
    e->kvm = open_device(err);
    int r = e->kvm < 0 ? e->kvm : check_device(e->kvm, err);
    r = r ? r : create_machine(e, err);
    r = r ? r : kvm_msr_filter_set(e, err);
    if (r) {
        kvm_destroy(e);
        return r;
    }
    *out = e;
    return 0;
}

static int kvm_set_options(struct engine *e, const struct engine_options *options, struct error *err)
{
    if (options->perf_map || options->dump_code_count)
        log_info("engine kvm translates nothing: --perf-map and --dump-code have no effect");
    if (options->irqchip == IRQCHIP_USER)
        return 0;
    int r = kvm_irqchip_split(e);
    if (r == 0)
        return kvm_msr_filter_set(e, err);
    return options->irqchip == IRQCHIP_AUTO ? 0 : error_set(err, r, "--kvm-irqchip split: " DEVICE " cannot: %s", strerror(-r));
}

static int kvm_doorbell(struct engine *e, const struct engine_doorbell *doorbell, bool on)
{
    struct kvm_ioeventfd event = {
        .addr = doorbell->gpa,
        .len = doorbell->size_bytes,
        .datamatch = doorbell->match ? doorbell->value : 0,
        .fd = doorbell->fd,
        .flags = (doorbell->match ? KVM_IOEVENTFD_FLAG_DATAMATCH : 0) | (on ? 0 : KVM_IOEVENTFD_FLAG_DEASSIGN),
    };
    return kvm_call(e->vm, KVM_IOEVENTFD, &event);
}

/* KVM looks at memory itself. */
static void kvm_invalidate(struct engine *e, gpa_t gpa, uint64_t length_bytes)
{
}

const struct engine_ops kvm_engine_ops = {
    .name = "kvm",
    .help = "the processor's hardware virtualization, through /dev/kvm",
    .probe = kvm_probe,
    .worthwhile = kvm_worthwhile,
    .create = kvm_create,
    .destroy = kvm_destroy,
    .set_options = kvm_set_options,
    .limit_cpuid = kvm_limit_cpuid,
    .irqchip = kvm_irqchip,
    .vcpu_create = kvm_vcpu_create,
    .vcpu_destroy = kvm_vcpu_destroy,
    .run = kvm_vcpu_run,
    .kick = kvm_vcpu_kick,
    .state_changed = kvm_vcpu_state_changed,
    .invalidate = kvm_invalidate,
    .collect_dirty = kvm_collect_dirty,
    .doorbell = kvm_doorbell,
};
