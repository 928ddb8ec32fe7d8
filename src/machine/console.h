/*
 * Console back ends: where a serial port's bytes go and come from. stdio (raw terminal, Ctrl-A commands), pty, file:PATH, unix:PATH, none.
 *
 * A tap hears all output, whatever the back end does with it, and may type: how a console in the background is logged and attached to.
 *
 * Output that the other side does not take is kept, up to CONSOLE_BACKLOG_BYTES; beyond that new output is dropped and counted: a guest never
 * waits for a reader.
 * Threading: with the device lock held (the loop's thread or a vCPU's).
 */
#ifndef DOPPEL_MACHINE_CONSOLE_H
#define DOPPEL_MACHINE_CONSOLE_H

#include <stddef.h>
#include <stdint.h>

#include "util/error.h"
#include "util/loop.h"

#define CONSOLE_BACKLOG_BYTES (1u << 20)

struct console;

struct console_ops {
    /* Bytes typed; returns how many were taken. The rest waits for console_resume. */
    size_t (*receive)(void *ctx, const uint8_t *data, size_t size_bytes);
    /* A character after Ctrl-A on a terminal. Optional. */
    void (*command)(void *ctx, int character);
    void *ctx;
};

struct console_tap {
    void (*output)(void *ctx, const uint8_t *data, size_t size_bytes);
    void (*room)(void *ctx); /* console_type can take more */
    void *ctx;
};

/* `what` names the option for messages ("--console"). */
int console_open(struct console **console, const char *spec, const char *what, struct loop *loop, int input_fd, int output_fd,
                 const struct console_ops *ops, struct error *err) __attribute__((warn_unused_result));
void console_close(struct console *console); /* writes what is left while the other side takes it; restores the terminal */
void console_write(struct console *console, const uint8_t *data, size_t size_bytes);
void console_resume(struct console *console);
void console_set_tap(struct console *console, const struct console_tap *tap); /* copied; NULL: none any more */
/* As if typed, Ctrl-A included; returns how many bytes were taken, see console_tap.room for the rest. */
size_t console_type(struct console *console, const uint8_t *data, size_t size_bytes);

#endif
