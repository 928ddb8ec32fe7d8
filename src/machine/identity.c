/*
 * Who a machine is. One that goes on from a snapshot gets another generation ID, which its guest is told. A clone also gets other addresses of network cards, made of that ID, so that whoever
 * starts it knows them: a card shows its own when the guest's driver looks next (the agent does that at once, see docs/clones.md), and until then takes what is sent to the old one.
 * Threading: before the start.
 */
#include <stdio.h>
#include <string.h>

#include "device/virtio_net.h"
#include "machine/machine_priv.h"

void machine_clone_mac(const struct vmgenid_guid *generation, unsigned index, uint8_t mac[6])
{
    char text[VMGENID_TEXT_BYTES];
    vmgenid_format(generation, text);
    virtio_net_default_mac(mac, text, NULL, index);
}

int machine_become_another(struct machine *machine, struct error *err)
{
    const struct machine_config *config = machine->config;
    struct vmgenid_guid guid = config->generation_id;
    int r = config->has_generation_id ? 0 : vmgenid_draw(&guid);
    if (r == 0)
        r = vmgenid_renew(machine->vmgenid, &guid);
    for (unsigned i = 0; r == 0 && config->is_clone && i < config->net_count; i++) {
        uint8_t mac[6];
        machine_clone_mac(&guid, i, mac);
        if (machine->net[i]) /* not "none" */
            virtio_net_set_mac(machine->net[i]->device, mac);
    }
    return r ? error_set(err, r, "the virtual machine does not get a generation ID of its own: %s", strerror(-r)) : 0;
}
