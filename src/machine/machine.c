/*
 * Puts a machine together and takes it apart (machine.h). Every part with guest-visible state is in machine->part, in order of creation:
 * reset, state and destruction are loops over that list. Before the vCPUs start nothing needs the device lock; afterwards
 * the parts are touched with it only.
 */
#include "machine/machine_priv.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "chipset/acpi.h"
#include "machine/post_copy.h"
#include "state/inputs.h"
#include "util/log.h"

#define OTHER_THREADS 3u /* the loop, signals, a disk */
#define SPARE_BYTES ((size_t)16 << 20)

void machine_add_part(struct machine *machine, const struct machine_part *part)
{
    if (machine->part_count == MACHINE_PARTS_MAX)
        abort(); /* a machine is made of fewer by construction: CONFIG_*_MAX */
    unsigned at = machine->part_count++;
    for (; at && machine->part[at - 1].rank > part->rank; at--)
        machine->part[at] = machine->part[at - 1];
    machine->part[at] = *part;
}

void machine_remove_part(struct machine *machine, const void *object)
{
    for (unsigned i = 0; i < machine->part_count; i++)
        if (machine->part[i].object == object) {
            machine->part_count--;
            memmove(&machine->part[i], &machine->part[i + 1], (machine->part_count - i) * sizeof machine->part[0]);
            return;
        }
}

/* The list holds void pointers: one set of adapters per kind of part. */
#define PART_ADAPTERS(kind)                                                                        \
    static void part_##kind##_reset(void *object)                                                  \
    {                                                                                              \
        kind##_reset(object);                                                                      \
    }                                                                                              \
    static int part_##kind##_state(void *object, struct state_io *io)                              \
    {                                                                                              \
        return kind##_state(object, io);                                                           \
    }                                                                                              \
    static void part_##kind##_destroy(void *object)                                                \
    {                                                                                              \
        kind##_destroy(object);                                                                    \
    }
PART_ADAPTERS(pic)
PART_ADAPTERS(ioapic)
PART_ADAPTERS(pit)
PART_ADAPTERS(rtc)
PART_ADAPTERS(hpet)
PART_ADAPTERS(pm)
PART_ADAPTERS(i8042)
PART_ADAPTERS(uart)
PART_ADAPTERS(pci_host)

static int part_vmgenid_state(void *object, struct state_io *io)
{
    return vmgenid_state(object, io);
}

static void part_vmgenid_destroy(void *object)
{
    vmgenid_destroy(object);
}

static void part_pvpanic_destroy(void *object)
{
    pvpanic_destroy(object);
}

static void part_debugcon_destroy(void *object)
{
    debugcon_destroy(object);
}

#define ADD_PART(machine, kind, label, pointer)                                                    \
    machine_add_part(machine, &(struct machine_part){.name = label, .object = pointer, .reset = part_##kind##_reset,     \
                                                     .state = part_##kind##_state, .destroy = part_##kind##_destroy})

/* ---- wiring ---- */

/* An ISA interrupt arrives at the 8259 pair and at the IOAPIC, where IRQ 0 is on pin 2. */
static void isa_set(void *ctx, unsigned irq, bool level)
{
    struct machine *machine = ctx;
    pic_set_irq(machine->pic, irq, level);
    ioapic_set_pin(machine->ioapic, irq == CHIPSET_IRQ_PIT ? 2 : irq, level);
}

static struct irq_line isa_line(struct machine *machine, unsigned irq)
{
    return (struct irq_line){.set = isa_set, .ctx = machine, .pin = irq};
}

static void power_off(void *ctx)
{
    machine_stop(ctx, MACHINE_SHUTDOWN);
}

static void reset_asked(void *ctx)
{
    machine_reset(ctx);
}

static void panicked(void *ctx, bool crash_loaded)
{
    struct machine *machine = ctx;
    if (crash_loaded)
        return;
    machine_tell(machine, MACHINE_EVENT_PANIC, NULL);
    log_info("the guest reports a kernel panic");
    switch (machine->config->on_panic) {
    case ON_PANIC_EXIT:
        machine_stop(machine, MACHINE_CRASH);
        break;
    case ON_PANIC_RESTART:
        machine_reset(machine);
        break;
    case ON_PANIC_IGNORE:
        break;
    }
}

/* ---- consoles ---- */

static size_t serial_receive(void *ctx, const uint8_t *data, size_t size_bytes)
{
    struct machine *machine = ctx;
    size_t taken = uart_receive(machine->com1, data, size_bytes);
    machine->serial_read += taken;
    return taken;
}

static void serial_write(void *ctx, const uint8_t *data, size_t size_bytes)
{
    struct machine *machine = ctx;
    uint64_t passed = size_bytes;
    if (machine->serial_bucket.size)
        passed = token_bucket_take_some(&machine->serial_bucket, inputs_now_ns(), size_bytes);
    machine->serial_dropped += size_bytes - passed;
    machine->serial_written += passed;
    if (passed)
        console_write(machine->serial_console, data, passed);
}

static void serial_ready(void *ctx)
{
    struct machine *machine = ctx;
    console_resume(machine->serial_console);
}

static void debug_write(void *ctx, const uint8_t *data, size_t size_bytes)
{
    struct machine *machine = ctx;
    console_write(machine->debug_console, data, size_bytes);
}

static size_t ignore_input(void *ctx, const uint8_t *data, size_t size_bytes)
{
    return size_bytes;
}

static void key_quit(struct machine *machine)
{
    machine_stop(machine, MACHINE_STOPPED);
}

static void key_power_button(struct machine *machine)
{
    pm_power_button(machine->pm);
    machine_tell(machine, MACHINE_EVENT_POWER_BUTTON, NULL);
}

static void key_reset(struct machine *machine)
{
    machine_reset(machine);
}

/* The RTC's index port has the PC's NMI mask. */
static void key_nmi(struct machine *machine)
{
    if (!rtc_nmi_masked(machine->rtc))
        lapic_inject_nmi(machine->lapics, 0);
}

static void key_show_state(struct machine *machine)
{
    char *text = NULL;
    size_t size = 0;
    FILE *out = open_memstream(&text, &size);
    if (!out)
        return;
    machine_dump_locked(machine, out);
    fclose(out);
    log_text(text);
    free(text);
}

static void key_help(struct machine *machine);

static const struct {
    int character;
    const char *help;
    void (*run)(struct machine *machine);
} keys[] = {
#define KEY(character, help, function) {character, help, function},
#include "machine/keys.def"
#undef KEY
};
#define KEY_COUNT (sizeof keys / sizeof *keys)

static void key_help(struct machine *machine)
{
    char line[96];
    for (size_t i = 0; i < KEY_COUNT; i++) {
        snprintf(line, sizeof line, "Ctrl-A %c  %s\n", keys[i].character, keys[i].help);
        log_text(line);
    }
    log_text("Ctrl-A Ctrl-A  send Ctrl-A\n");
}

void machine_console_command(void *ctx, int character)
{
    for (size_t i = 0; i < KEY_COUNT; i++)
        if (keys[i].character == character)
            keys[i].run(ctx);
}

static int create_consoles(struct machine *machine, struct error *err)
{
    const struct machine_config *config = machine->config;
    struct console_ops serial = {.receive = serial_receive, .command = machine_console_command, .ctx = machine};
    struct console_ops debug = {.receive = ignore_input, .command = machine_console_command, .ctx = machine};
    int r = console_open(&machine->serial_console, config->console ? config->console : "stdio", "--console", machine->loop,
                         config->input_fd, config->output_fd, &serial, err);
    if (r == 0 && config->virtio_console)
        r = machine_open_virtio_console(machine, err);
    if (r == 0 && config->debug_console)
        r = console_open(&machine->debug_console, config->debug_console, "--debug-console", machine->loop, config->input_fd,
                         config->output_fd, &debug, err);
    return r;
}

/* ---- the chipset ---- */

static int create_interrupt_controllers(struct machine *machine)
{
    int r = lapic_set_create(&machine->lapics, machine->cpu_count, machine->loop, &machine_lapic_ops, machine);
    if (r)
        return r;
    machine->msi = machine_msi_target(machine);
    struct ioapic_config ioapic = {.bus = machine->bus, .msi = machine->msi, .level_pin = machine_level_pin, .level_ctx = machine};
    r = ioapic_create(&machine->ioapic, &ioapic);
    if (r)
        return r;
    ADD_PART(machine, ioapic, "ioapic", machine->ioapic);
    struct pic_config pic = {.bus = machine->bus, .intr = {.set = machine_extint, .ctx = machine}};
    r = pic_create(&machine->pic, &pic);
    if (r)
        return r;
    ADD_PART(machine, pic, "pic", machine->pic);
    return 0;
}

static void ioapic_line_set(void *ctx, unsigned pin, bool level)
{
    struct machine *machine = ctx;
    ioapic_set_pin(machine->ioapic, pin, level);
}

static void hpet_replaces_legacy(void *ctx, bool replaced)
{
    struct machine *machine = ctx;
    pit_set_irq_enabled(machine->pit, !replaced);
    rtc_set_irq_enabled(machine->rtc, !replaced);
}

static int create_hpet(struct machine *machine)
{
    struct hpet_config hpet = {.bus = machine->bus,
                               .loop = machine->loop,
                               .legacy = {isa_line(machine, CHIPSET_IRQ_PIT), isa_line(machine, CHIPSET_IRQ_RTC)},
                               .legacy_changed = hpet_replaces_legacy,
                               .ctx = machine};
    for (unsigned i = 0; i < HPET_PINS; i++)
        hpet.pins[i] = (struct irq_line){.set = ioapic_line_set, .ctx = machine, .pin = HPET_PIN_FIRST + i};
    int r = hpet_create(&machine->hpet, &hpet);
    if (r == 0)
        ADD_PART(machine, hpet, "hpet", machine->hpet);
    return r;
}

static int create_timers_and_power(struct machine *machine)
{
    struct pit_config pit = {.bus = machine->bus, .loop = machine->loop, .irq = isa_line(machine, CHIPSET_IRQ_PIT)};
    int r = pit_create(&machine->pit, &pit);
    if (r)
        return r;
    ADD_PART(machine, pit, "pit", machine->pit);
    struct rtc_config rtc = {.bus = machine->bus,
                             .loop = machine->loop,
                             .irq = isa_line(machine, CHIPSET_IRQ_RTC),
                             .ram_low_bytes = physmap_low_bytes(machine->memory),
                             .ram_high_bytes = physmap_high_bytes(machine->memory)};
    r = rtc_create(&machine->rtc, &rtc);
    if (r)
        return r;
    ADD_PART(machine, rtc, "rtc", machine->rtc);
    r = create_hpet(machine);
    if (r)
        return r;
    struct pm_config pm = {.bus = machine->bus,
                           .loop = machine->loop,
                           .sci = isa_line(machine, CHIPSET_SCI_IRQ),
                           .power_off = power_off,
                           .reset = reset_asked,
                           .ctx = machine};
    r = pm_create(&machine->pm, &pm);
    if (r)
        return r;
    ADD_PART(machine, pm, "pm", machine->pm);
    struct i8042_config i8042 = {.bus = machine->bus, .irq = isa_line(machine, CHIPSET_IRQ_KEYBOARD), .reset = reset_asked, .ctx = machine};
    r = i8042_create(&machine->i8042, &i8042);
    if (r)
        return r;
    ADD_PART(machine, i8042, "i8042", machine->i8042);
    return 0;
}

/* Of no snapshot yet: what the configuration says, or just any. */
static int create_generation_id(struct machine *machine)
{
    struct vmgenid_config vmgenid = {.memory = machine->memory, .pm = machine->pm, .guid = machine->config->generation_id};
    int r = machine->config->has_generation_id ? 0 : vmgenid_draw(&vmgenid.guid);
    if (r == 0)
        r = vmgenid_create(&machine->vmgenid, &vmgenid);
    if (r == 0)
        machine_add_part(machine, &(struct machine_part){.name = "vmgenid", .object = machine->vmgenid, .state = part_vmgenid_state, .destroy = part_vmgenid_destroy});
    return r;
}

static int create_ports(struct machine *machine)
{
    token_bucket_init(&machine->serial_bucket, &machine->config->serial_limit, inputs_now_ns());
    struct uart_config uart = {.bus = machine->bus,
                               .loop = machine->loop,
                               .port = UART_COM1_PORT,
                               .irq = isa_line(machine, CHIPSET_IRQ_COM1),
                               .sink = {serial_write, machine},
                               .ready = serial_ready,
                               .ready_ctx = machine};
    int r = uart_create(&machine->com1, &uart);
    if (r)
        return r;
    ADD_PART(machine, uart, "com1", machine->com1);
    struct pvpanic_config pvpanic = {.bus = machine->bus, .panicked = panicked, .ctx = machine};
    r = pvpanic_create(&machine->pvpanic, &pvpanic);
    if (r)
        return r;
    machine_add_part(machine, &(struct machine_part){.name = "pvpanic", .object = machine->pvpanic, .destroy = part_pvpanic_destroy});
    struct debugcon_config debugcon = {.bus = machine->bus, .sink = {debug_write, machine}};
    r = debugcon_create(&machine->debugcon, &debugcon);
    if (r)
        return r;
    machine_add_part(machine, &(struct machine_part){.name = "debugcon", .object = machine->debugcon, .destroy = part_debugcon_destroy});
    return 0;
}

static int create_pci(struct machine *machine)
{
    struct pci_host_config pci = {
        .bus = machine->bus,
        .msi = &machine->msi,
        .ecam_base = CHIPSET_ECAM_BASE,
        .mem32_base = CHIPSET_PCI_MEM32_BASE,
        .mem32_size_bytes = CHIPSET_PCI_MEM32_BYTES,
        .mem64_base = CHIPSET_PCI_MEM64_BASE,
        .mem64_size_bytes = CHIPSET_PCI_MEM64_BYTES,
        .port_base = CHIPSET_PCI_PORT_BASE,
        .port_size_bytes = CHIPSET_PCI_PORT_BYTES,
        .cf9 = &pm_reset_port_ops,
        .cf9_ctx = machine->pm,
    };
    for (unsigned i = 0; i < 4; i++)
        pci.intx[i] = (struct irq_line){.set = ioapic_line_set, .ctx = machine, .pin = CHIPSET_GSI_PCI + i};
    int r = pci_host_create(&machine->pci, &pci);
    if (r)
        return r;
    ADD_PART(machine, pci_host, "pci-host", machine->pci);
    return machine_create_hotplug(machine);
}

/* Lines that belong to nobody else, those below 16 first: they are all that kernels without ACPI have. More devices share the lines that PCI would have. */
static int create_mmio(struct machine *machine)
{
    static const uint8_t own[] = {5, 10, 11, 14, 15, 6, 12, 3, 7};
    struct virtio_mmio_host *mmio = &machine->mmio;
    mmio->bus = machine->bus;
    mmio->base = CHIPSET_VIRTIO_MMIO_BASE;
    mmio->places = CHIPSET_VIRTIO_MMIO_PLACES;
    for (unsigned i = 0; i < sizeof own; i++)
        mmio->line[mmio->line_count++] = isa_line(machine, own[i]);
    mmio->shared_first = mmio->line_count;
    for (unsigned i = 0; i < 4; i++)
        mmio->line[mmio->line_count++] = (struct irq_line){.set = ioapic_line_set, .ctx = machine, .pin = CHIPSET_GSI_PCI + i};
    return bus_add(machine->bus, BUS_PORT, CHIPSET_RESET_PORT, 1, &pm_reset_port_ops, machine->pm);
}

static int create_chipset(struct machine *machine, struct error *err)
{
    machine->bus = bus_create();
    int r = machine->bus ? 0 : -ENOMEM;
    if (r == 0)
        r = create_interrupt_controllers(machine);
    if (r == 0)
        r = create_timers_and_power(machine);
    if (r == 0)
        r = create_generation_id(machine);
    if (r == 0)
        r = create_ports(machine);
    if (r == 0)
        r = machine->config->transport == TRANSPORT_MMIO ? create_mmio(machine) : create_pci(machine);
    return r ? error_set(err, r, "cannot make the chipset: %s", strerror(-r)) : 0;
}

/* ---- power-on ---- */

static int build_tables(struct machine *machine, gpa_t *rsdp, struct error *err)
{
    const struct virtio_mmio_host *mmio = &machine->mmio;
    struct acpi_config acpi = {.cpu_count = machine->cpu_count, .hpet = true, .com1 = true, .pvpanic = true, .no_pci = !machine->pci,
                               .hotplug = machine_hotplug_slots(), .generation = vmgenid_get(machine->vmgenid)};
    for (unsigned i = 0; i < mmio->device_count; i++)
        acpi.virtio[acpi.virtio_count++] = (struct acpi_virtio){.address = (uint32_t)virtio_mmio_address(mmio, i),
                                                                .gsi = mmio->line[virtio_mmio_line(mmio, i)].pin};
    return acpi_build(machine->memory, &acpi, rsdp, err);
}

static int load_kernel(struct machine *machine, struct error *err)
{
    const struct machine_config *config = machine->config;
    char *line = machine_command_line(machine);
    struct boot_config boot = {.kernel_path = config->kernel,
                               .initrd_path = config->initrd,
                               .kernel_fd = &machine->kernel_fd,
                               .initrd_fd = &machine->initrd_fd,
                               .command_line = line,
                               .unpack_in_guest = config->boot_in_guest};
    if (!line)
        return error_set(err, -ENOMEM, "out of memory");
    int r = build_tables(machine, &boot.rsdp, err);
    if (r == 0)
        r = boot_load(machine->memory, &boot, &machine->boot, err);
    free(line);
    return r;
}

int machine_power_on(struct machine *machine, void *ctx, struct error *err)
{
    for (unsigned i = 0; i < machine->part_count; i++)
        if (machine->part[i].reset)
            machine->part[i].reset(machine->part[i].object);
    for (unsigned i = 0; i < machine->cpu_count; i++) {
        lapic_reset(machine->lapics, i, false);
        lapic_set_virtual_wire(machine->lapics, i);
    }
    if (machine->pci)
        pci_host_assign(machine->pci);
    int r = load_kernel(machine, err);
    if (r)
        return r;

    uint64_t tsc_offset = -inputs_tsc(); /* the guest's counters start at zero, all with the same offset */
    for (unsigned i = 0; i < machine->cpu_count; i++) {
        struct vcpu *vcpu = machine->vcpu[i].vcpu;
        machine->vcpu[i].pvclock = (struct pvclock){0};
        cpu_reset(&vcpu->cpu, CPU_RESET_POWER_ON);
        vcpu->cpu.tsc_offset = tsc_offset;
        if (i == 0)
            boot_cpu_setup(&vcpu->cpu, &machine->boot);
        else
            vcpu->cpu.activity = CPU_WAIT_FOR_SIPI;
        vcpu->trace = machine_vcpu_trace(machine, i);
        machine->engine_ops->state_changed(vcpu);
    }
    r = machine_apics_give(machine);
    return r ? error_set(err, r, "the engine does not take the local APICs' state: %s", strerror(-r)) : 0;
}

/* ---- creation ---- */

static int set_engine_options(struct machine *machine, bool goes_on, struct error *err)
{
    const struct machine_config *config = machine->config;
    const struct engine_options options = {
        .direct = config->direct, .perf_map = config->perf_map, .dump_code = config->dump_code, .dump_code_count = config->dump_code_count, .irqchip = config->irqchip, .patient = goes_on};
    if (machine->engine_ops->set_options)
        return machine->engine_ops->set_options(machine->engine, &options, err);
    if (config->perf_map || config->dump_code_count)
        log_info("engine %s translates nothing: --perf-map and --dump-code have no effect", machine->engine_ops->name);
    return 0;
}

static void destroy_engine(struct machine *machine)
{
    vcpu_threads_destroy(machine);
    if (machine->engine)
        machine->engine_ops->destroy(machine->engine);
    machine->engine = NULL;
    machine->irqchip = NULL;
    if (machine->bus)
        machine_connect_doorbells(machine);
}

static bool engine_is_automatic(const struct machine *machine)
{
    return !machine->config->engine || strcmp(machine->config->engine, "auto") == 0;
}

/* What is taken later: stacks for the processors' threads and some others, and what these need in turn. Where memory is counted, only asking tells. */
static bool memory_is_left(const struct machine *machine)
{
    pthread_attr_t attributes;
    size_t stack = 0;
    if (!pthread_getattr_default_np(&attributes)) {
        pthread_attr_getstacksize(&attributes, &stack);
        pthread_attr_destroy(&attributes);
    }
    size_t bytes = (machine->cpu_count + OTHER_THREADS) * stack + SPARE_BYTES;
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at != MAP_FAILED)
        munmap(at, bytes);
    return at != MAP_FAILED;
}

/* Anew for each engine that is tried: one may take features away. */
static int create_cpuid(struct machine *machine, struct error *err)
{
    struct cpuid_config cpuid = {.cpu_count = machine->cpu_count, .tsc_khz = machine->tsc_khz, .apic_bus_hz = LAPIC_TIMER_HZ,
                                 .no_random = !inputs_random_is_host()};
    cpuid_table_destroy(machine->cpuid);
    machine->cpuid = processor_table(&cpuid, &machine->config->processor, err);
    return machine->cpuid ? 0 : err->code;
}

/* `goes_on`: a state that is loaded next tells what the guest's counters run at. */
static int create_engine(struct machine *machine, bool goes_on, struct error *err)
{
    const char *name = engine_is_automatic(machine) ? "auto" : machine->config->engine;
    machine->engine_ops = engine_find(name, machine->engine_reason, err);
    if (!machine->engine_ops)
        return err->code ? err->code : -EINVAL;
    machine_begin_sandbox(machine);
    machine->tsc_khz = goes_on ? inputs_tsc_khz_roughly() : inputs_tsc_khz();
    for (;;) {
        int r = create_cpuid(machine, err);
        if (r)
            return r;
        r = machine->engine_ops->create(&machine->engine, machine->memory, err);
        if (r == 0) {
            r = set_engine_options(machine, goes_on, err);
            if (r == 0 && machine->engine_ops->limit_cpuid)
                r = machine->engine_ops->limit_cpuid(machine->engine, machine->cpuid, err);
            if (r)
                return r;
            machine->irqchip = machine->engine_ops->irqchip ? machine->engine_ops->irqchip(machine->engine) : NULL;
            r = vcpu_threads_create(machine, err);
        }
        bool crowded = r == 0 && engine_is_automatic(machine) && !memory_is_left(machine);
        if (crowded)
            r = error_set(err, -ENOMEM, "no memory is left for threads");
        /* What an engine needs may depend on the guest: its memory, the number of its processors. */
        const struct engine_ops *next = r && engine_is_automatic(machine) ? engine_next(machine->engine_ops, err, machine->engine_reason) : NULL;
        if (!next)
            return crowded ? 0 : r;
        destroy_engine(machine);
        machine->engine_ops = next;
    }
}

static int open_trace(struct machine *machine, struct error *err)
{
    const char *path = machine->config->trace;
    if (!path)
        return 0;
    machine->trace = strcmp(path, "-") == 0 ? stderr : fopen(path, "we");
    if (!machine->trace)
        return error_set(err, -errno, "--trace: cannot write %s: %s", path, strerror(errno));
    machine->trace_buffer = malloc(BUFSIZ);
    if (!machine->trace_buffer)
        return error_set(err, -ENOMEM, "out of memory");
    if (machine->trace != stderr)
        (void)setvbuf(machine->trace, machine->trace_buffer, _IOFBF, BUFSIZ);
    return 0;
}

int machine_create(struct machine **out, const struct machine_config *config, struct error *err)
{
    return machine_create_with(out, config, machine_power_on, NULL, err);
}

int machine_create_with(struct machine **out, const struct machine_config *config, int (*begin)(struct machine *machine, void *ctx, struct error *err),
                        void *ctx, struct error *err)
{
    struct error ignored = {0};
    err = err ? err : &ignored;
    int r = machine_config_check(config, err);
    if (r)
        return r;
    struct machine *machine = calloc(1, sizeof *machine);
    if (!machine)
        return error_set(err, -ENOMEM, "out of memory");
    if (machine_config_copy(&machine->own_config, config)) {
        free(machine);
        return error_set(err, -ENOMEM, "out of memory");
    }
    machine->config = &machine->own_config;
    machine->cpu_count = config->cpus;
    machine->kernel_fd = machine->initrd_fd = -1;
    pthread_mutex_init(&machine->device_lock, NULL);
    pthread_mutex_init(&machine->run_lock, NULL);
    pthread_mutex_init(&machine->join_lock, NULL);
    pthread_mutex_init(&machine->snapshot_lock, NULL);
    pthread_mutex_init(&machine->watch_lock, NULL);
    pthread_cond_init(&machine->run_changed, NULL);
    r = loop_create(&machine->loop, &machine->device_lock);
    if (r)
        error_set(err, r, "cannot make an event loop: %s", strerror(-r));
    if (r == 0 && (!(machine->still_timer = loop_timer_create(machine->loop, machine_still, machine)) ||
                   !(machine->throttle_timer = loop_timer_create(machine->loop, machine_throttle_tick, machine))))
        r = error_set(err, -ENOMEM, "out of memory");
    if (r == 0)
        r = open_trace(machine, err);
    if (r == 0)
        r = machine_create_memory(machine, err);
    if (r == 0)
        r = create_chipset(machine, err);
    if (r == 0)
        r = machine_create_devices(machine, err);
    if (r == 0 && machine_add_boot_timer(machine))
        r = error_set(err, -ENOMEM, "out of memory");
    if (r == 0)
        r = create_engine(machine, begin != machine_power_on, err);
    if (r == 0)
        r = machine_check_memory(machine, err);
    if (r == 0)
        machine_connect_doorbells(machine);
    if (r == 0)
        r = begin(machine, ctx, err);
    if (r == 0)
        r = create_consoles(machine, err); /* the terminal goes raw only when all else is well */
    if (r == 0)
        r = machine_make_sandbox(machine, err);
    if (r) {
        machine_destroy(machine);
        return r;
    }
    *out = machine;
    return 0;
}

static void *loop_main(void *arg)
{
    struct machine *machine = arg;
    pthread_setname_np(pthread_self(), "loop");
    if (!machine_enter_sandbox(machine, IN_LOOP))
        return NULL;
    int r = loop_run(machine->loop);
    if (r) {
        log_error("the event loop failed: %s", strerror(-r));
        machine_stop(machine, MACHINE_ERROR);
    }
    return NULL;
}

static void first_input(void *ctx)
{
    struct machine *machine = ctx;
    console_resume(machine->serial_console);
    console_resume(machine->virtio_console_backend);
}

int machine_start(struct machine *machine, struct error *err)
{
    pthread_mutex_lock(&machine->run_lock);
    bool again = machine->started;
    machine->started = true;
    pthread_mutex_unlock(&machine->run_lock);
    if (again)
        return error_set(err, -EALREADY, "the virtual machine was started already");
    int r = pthread_create(&machine->loop_thread, NULL, loop_main, machine);
    if (r)
        return error_set(err, -r, "cannot start a thread: %s", strerror(r));
    machine->loop_started = true;
    if (engine_is_automatic(machine))
        log_info("engine %s (auto): %s", machine->engine_ops->name, machine->engine_reason);
    loop_post(machine->loop, first_input, machine);
    machine_tell(machine, MACHINE_EVENT_STARTED, machine->engine_ops->name);
    if (machine_is_paused(machine))
        machine_tell(machine, MACHINE_EVENT_PAUSED, NULL);
    r = vcpu_threads_start(machine, err);
    if (r == 0)
        read_ahead_start(machine);
    return r;
}

bool machine_quiesce(struct machine *machine)
{
    bool quiet = true;
    for (unsigned i = 0; i < machine->part_count; i++)
        if (machine->part[i].quiesce && !machine->part[i].quiesce(machine->part[i].object))
            quiet = false;
    return quiet;
}

void machine_destroy(struct machine *machine)
{
    if (!machine)
        return;
    machine_stop(machine, MACHINE_STOPPED);
    vcpu_threads_join(machine);
    if (machine->loop_started) {
        loop_stop(machine->loop);
        pthread_join(machine->loop_thread, NULL);
    }
    read_ahead_close(machine);
    post_copy_target_stop(machine);
    machine_retry_disks(machine, true);
    if (machine->loop)
        while (!machine_quiesce(machine) && loop_run_once(machine->loop, -1) >= 0)
            continue;
    while (machine->part_count) {
        struct machine_part *part = &machine->part[--machine->part_count];
        if (part->destroy)
            part->destroy(part->object);
    }
    machine_destroy_metadata(machine);
    machine_close_pmems(machine);
    console_close(machine->serial_console);
    console_close(machine->virtio_console_backend);
    console_close(machine->debug_console);
    destroy_engine(machine);
    cpuid_table_destroy(machine->cpuid);
    if (machine->lapics)
        lapic_set_destroy(machine->lapics);
    if (machine->bus)
        bus_destroy(machine->bus);
    if (machine->memory)
        physmap_destroy(machine->memory);
    post_copy_target_destroy(machine);
    post_copy_source_destroy(machine);
    for (unsigned i = 0; i < CONFIG_DISKS_MAX; i++)
        if (machine->disk[i].block)
            block_close(machine->disk[i].block);
    for (unsigned i = 0; i < machine->device_count; i++)
        free(machine->device[i]);
    if (machine->eject_timer)
        loop_timer_destroy(machine->eject_timer);
    if (machine->still_timer)
        loop_timer_destroy(machine->still_timer);
    if (machine->throttle_timer)
        loop_timer_destroy(machine->throttle_timer);
    if (machine->loop)
        loop_destroy(machine->loop);
    sandbox_destroy(machine->sandbox);
    sandbox_destroy(machine->sandbox_begun);
    if (machine->kernel_fd >= 0)
        close(machine->kernel_fd);
    if (machine->initrd_fd >= 0)
        close(machine->initrd_fd);
    machine_trace_destroy(machine);
    if (machine->trace && machine->trace != stderr)
        fclose(machine->trace);
    free(machine->trace_buffer);
    pthread_cond_destroy(&machine->run_changed);
    pthread_mutex_destroy(&machine->watch_lock);
    pthread_mutex_destroy(&machine->join_lock);
    pthread_mutex_destroy(&machine->snapshot_lock);
    pthread_mutex_destroy(&machine->run_lock);
    pthread_mutex_destroy(&machine->device_lock);
    machine_config_clear(&machine->own_config);
    free(machine);
}

void machine_power_button(struct machine *machine)
{
    pthread_mutex_lock(&machine->device_lock);
    pm_power_button(machine->pm);
    machine_tell(machine, MACHINE_EVENT_POWER_BUTTON, NULL);
    pthread_mutex_unlock(&machine->device_lock);
}

/* ---- state ---- */

#define AWAY_NS_MOST (10 * 365 * 86400ull * 1000000000)
#define TSC_TOLERANCE 1000 /* parts of the frequency in which two hosts' may differ and be called the same: what clocks drift and calibrations vary by */

/* What the counters gain when they are to catch up. A state may say anything, and years are enough. */
static uint64_t ticks_away(const struct machine *machine)
{
    uint64_t ns = machine->catch_up ? rtc_away_ns(machine->rtc) : 0;
    return (uint64_t)((unsigned __int128)(ns < AWAY_NS_MOST ? ns : AWAY_NS_MOST) * machine->tsc_khz / 1000000);
}

/* The guest's counters go on from where they were, whatever this host's shows. */
static void clocks_state(struct machine *machine, struct state_io *io)
{
    uint64_t tsc = inputs_tsc(), khz = machine->tsc_khz;
    state_u64(io, &tsc);
    state_u64(io, &khz);
    if (!state_loading(io) || state_failed(io))
        return;
    uint64_t difference = khz > machine->tsc_khz ? khz - machine->tsc_khz : machine->tsc_khz - khz;
    if (difference > machine->tsc_khz / TSC_TOLERANCE) {
        char reason[128];
        snprintf(reason, sizeof reason, "the guest's time-stamp counter runs at %llu kHz, this host's at %llu kHz", (unsigned long long)khz,
                 (unsigned long long)machine->tsc_khz);
        state_fail(io, reason);
    }
    machine->tsc_khz = khz;
    uint64_t shift = tsc - inputs_tsc() + ticks_away(machine); /* one for all: they are in step */
    for (unsigned i = 0; i < machine->cpu_count; i++)
        machine->vcpu[i].vcpu->cpu.tsc_offset += shift;
}

static int vcpu_state(struct vcpu_thread *cpu, struct state_io *io)
{
    uint32_t requests = atomic_load(&cpu->requests) & (REQUEST_INIT | REQUEST_STARTUP);
    uint8_t vector = atomic_load(&cpu->startup_vector);
    int r = cpu_state_state(&cpu->vcpu->cpu, io);
    pvclock_state(&cpu->pvclock, io);
    state_u32(io, &requests);
    state_u8(io, &vector);
    if (state_loading(io)) {
        if (requests & ~(REQUEST_INIT | REQUEST_STARTUP))
            state_fail(io, "a processor was asked for what there is not");
        atomic_store(&cpu->startup_vector, vector);
        atomic_fetch_or(&cpu->requests, requests & (REQUEST_INIT | REQUEST_STARTUP));
        cpu->machine->engine_ops->state_changed(cpu->vcpu);
    }
    return r;
}

static bool is_served(void *ctx, uint8_t vector)
{
    return lapic_has_vector(ctx, vector);
}

static int apics_state(struct machine *machine, struct state_io *io)
{
    int r = state_loading(io) ? 0 : machine_apics_take(machine);
    if (r)
        state_fail(io, "the engine does not tell the local APICs' state");
    int done = lapic_state(machine->lapics, io);
    if (state_loading(io) && done == 0)
        ioapic_end_unserved(machine->ioapic, is_served, machine->lapics);
    if (state_loading(io) && done == 0 && machine_apics_give(machine)) {
        done = -EINVAL;
        state_fail(io, "the engine does not take the local APICs' state");
    }
    machine_apics_rest(machine);
    return r ? r : done;
}

int machine_state(struct machine *machine, struct state_io *io)
{
    if (state_loading(io))
        machine_hold_messages(machine);
    state_begin(io, "machine", 1);
    int r = state_loading(io) ? 0 : machine_apics_arrive(machine);
    if (r)
        state_fail(io, "the engine does not tell the processors' state");
    else
        r = cpuid_state(machine->cpuid, io);
    for (unsigned i = 0; i < machine->part_count && r == 0; i++)
        if (machine->part[i].state)
            r = machine->part[i].state(machine->part[i].object, io);
    for (unsigned i = 0; i < machine->cpu_count && r == 0; i++)
        r = vcpu_state(&machine->vcpu[i], io);
    clocks_state(machine, io);
    if (r == 0)
        r = apics_state(machine, io); /* after the counters: deadlines are theirs */
    if (state_loading(io))
        machine_release_messages(machine);
    int end = state_end(io);
    return r ? r : end;
}
