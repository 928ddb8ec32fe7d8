/* Keys from outside. Any thread. */
#include <errno.h>

#include "machine/machine_priv.h"

int machine_ctrl_alt_del(struct machine *machine, struct error *err)
{
    /* Scan code set 2: the left Ctrl and Alt keys and the Delete key of the middle block go down, and up again. */
    static const uint8_t codes[] = {0x14, 0x11, 0xE0, 0x71, 0xE0, 0xF0, 0x71, 0xF0, 0x11, 0xF0, 0x14};
    pthread_mutex_lock(&machine->device_lock);
    size_t taken = i8042_key(machine->i8042, codes, sizeof codes);
    pthread_mutex_unlock(&machine->device_lock);
    return taken == sizeof codes ? 0 : error_set(err, -EBUSY, "the guest does not read its keyboard");
}
