/* Fuzz target: what a guest says on its console, shown as a terminal would. Whatever it was, the answers are JSON, and XML without what XML must not have. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "control/vm_control_priv.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void must(int condition)
{
    if (!condition)
        abort();
}

static void look(struct vm_screen *screen)
{
    const char *type;
    char *json = vm_screen_render(screen, "json", &type), *text = vm_screen_render(screen, "text", &type), *svg = vm_screen_render(screen, "svg", &type);
    must(json && text && svg);
    json_t *value = json_loads(json, 0, NULL);
    size_t rows = (size_t)json_integer_value(json_object_get(value, "rows")), lines = 0;
    must(value && rows > 0 && json_array_size(json_object_get(value, "lines")) == rows);
    for (const char *c = text; *c; c++)
        lines += *c == '\n';
    must(lines == rows);
    for (const char *c = svg; *c; c++)
        must((unsigned char)*c >= ' ' || *c == '\n');
    must(strncmp(svg, "<svg ", 5) == 0 && strcmp(svg + strlen(svg) - 7, "</svg>\n") == 0);
    json_decref(value);
    free(json);
    free(text);
    free(svg);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct vm_screen *screen = vm_screen_create();
    must(screen != NULL);
    /* The first byte is where somebody looks for the first time, which makes the terminal. */
    size_t first = size ? data[0] % size : 0;
    vm_screen_feed(screen, (const char *)data, first);
    look(screen);
    vm_screen_feed(screen, (const char *)data + first, size - first);
    look(screen);
    vm_screen_destroy(screen);
    return 0;
}
