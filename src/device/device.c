/*
 * The table of device classes, made from devices.def.
 */
#include "device/device.h"

#include <string.h>

#define DEVICE(symbol) extern const struct device_class symbol;
#include "device/devices.def"
#undef DEVICE

const struct device_class *const device_classes[] = {
#define DEVICE(symbol) &symbol,
#include "device/devices.def"
#undef DEVICE
    NULL,
};

const struct device_class *device_class_find(const char *name)
{
    for (const struct device_class *const *class = device_classes; *class; class++) {
        if (!strcmp((*class)->name, name))
            return *class;
    }
    return NULL;
}
