/* What control clients send, as the broker reads it: any bytes, in pieces, on several connections. A name that is found must have been there, unescaped or not. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "sandbox/broker_names.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct broker_names *names = broker_names_create();
    static const char never[] = "/etc/shadow";
    bool escapes = memchr(data, '\\', size) != NULL, said = false;
    if (!names)
        return 0;
    for (size_t at = 0; at < size;) {
        size_t part = (size_t)data[at] % 32 + 1;
        part = part > size - at ? size - at : part;
        broker_names_take(names, data[at] % 20, (const char *)data + at, part);
        at += part;
    }
    said = memmem(data, size, "shadow", 6) != NULL || size > 3;
    if (broker_names_has(names, never) && !said && !escapes)
        abort();
    if (broker_names_has(names, "") || broker_names_is_made(names, never))
        abort();
    (void)broker_names_has_draft(names, "/etc/shadow.ABCDEF");
    broker_names_destroy(names);
    return 0;
}
