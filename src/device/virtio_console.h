/*
 * virtio-console: one port, /dev/hvc0 in Linux guests (virtio 1.2, section 5.3).
 *
 * Same shape as a UART (chipset/uart.h): a sink for what the guest writes, a receive function for what it reads, and a call back
 * when there is room again. Threading: with the device lock held.
 */
#ifndef DOPPEL_DEVICE_VIRTIO_CONSOLE_H
#define DOPPEL_DEVICE_VIRTIO_CONSOLE_H

#include <stddef.h>
#include <stdint.h>

#include "chipset/uart.h"
#include "device/device.h"

struct virtio_console_config {
    struct uart_sink sink;
    /* There is room for input again after virtio_console_receive took less than offered. Optional. May call virtio_console_receive. */
    void (*ready)(void *ctx);
    void *ready_ctx;
    uint16_t columns, rows; /* of the terminal; 0: unknown */
    int slot;               /* PCI slot, -1: the next free one */
};

/* Bytes arriving from outside. Takes what fits in the guest's buffers and returns how many. `device` is a virtio-console. */
size_t virtio_console_receive(struct device *device, const uint8_t *data, size_t size_bytes);
/* The terminal's window changed. */
void virtio_console_resize(struct device *device, uint16_t columns, uint16_t rows);

#endif
