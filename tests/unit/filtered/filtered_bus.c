/* What a guest does with a device's registers, on a vCPU's thread. */
#include "filtered.h"

#include "chipset/bus.h"

/* What other parts of the program have rules for. */
SANDBOX_ALLOW(IN_VCPU, close);
SANDBOX_ALLOW(IN_VCPU, epoll_ctl);

uint64_t __real_bus_read(struct bus *bus, enum bus_space space, uint64_t address, unsigned size);
uint64_t __wrap_bus_read(struct bus *bus, enum bus_space space, uint64_t address, unsigned size);
void __real_bus_write(struct bus *bus, enum bus_space space, uint64_t address, unsigned size, uint64_t value);
void __wrap_bus_write(struct bus *bus, enum bus_space space, uint64_t address, unsigned size, uint64_t value);

struct bus_access {
    struct bus *bus;
    enum bus_space space;
    uint64_t address, value;
    unsigned size;
};

static void run_read(void *ctx)
{
    struct bus_access *access = ctx;
    access->value = __real_bus_read(access->bus, access->space, access->address, access->size);
}

uint64_t __wrap_bus_read(struct bus *bus, enum bus_space space, uint64_t address, unsigned size)
{
    struct bus_access access = {bus, space, address, 0, size};
    filtered_call(IN_VCPU, run_read, &access);
    return access.value;
}

static void run_write(void *ctx)
{
    struct bus_access *access = ctx;
    __real_bus_write(access->bus, access->space, access->address, access->size, access->value);
}

void __wrap_bus_write(struct bus *bus, enum bus_space space, uint64_t address, unsigned size, uint64_t value)
{
    struct bus_access access = {bus, space, address, value, size};
    filtered_call(IN_VCPU, run_write, &access);
}
