/*
 * What a terminal at the console would show now: 24 lines of 80 characters, as text, as JSON, as a picture (SVG).
 *
 * The terminal is libvterm's. It exists from the first question on, begins with the console's last bytes, and follows what is said after them; a machine that nobody
 * asks has none. Its input is the guest's: whatever it says ends up in cells, of which only characters that XML and JSON may have are shown.
 * Threading: `lock` guards all; the control's thread feeds, the server's asks.
 */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "control/vm_control_priv.h"
#include "control/vterm_library.h"

#define ROWS 24
#define COLUMNS 80
#define CELL_WIDTH 8
#define CELL_HEIGHT 17
#define BASELINE 13
#define INK 0xd0d0d0u
#define PAPER 0x101010u
#define ESC 0x1b
#define DEL 0x7f

struct vm_screen {
    pthread_mutex_t lock; /* innermost */
    char recent[VM_SCREEN_RECENT_BYTES]; /* a ring: what was said last ends before recent_total % its size */
    uint64_t recent_total;
    VTerm *terminal;      /* NULL: nobody has asked */
    VTermScreen *cells;
    bool hidden; /* the cursor */
    bool escape; /* an escape sequence lacks its final byte */
};

int vm_screen_prepare(struct error *err)
{
    return library_load(&vterm_library_file, err);
}

struct vm_screen *vm_screen_create(void)
{
    struct vm_screen *screen = calloc(1, sizeof *screen);
    if (screen)
        pthread_mutex_init(&screen->lock, NULL);
    return screen;
}

void vm_screen_destroy(struct vm_screen *screen)
{
    if (!screen)
        return;
    if (screen->terminal)
        vterm_free(screen->terminal);
    pthread_mutex_destroy(&screen->lock);
    free(screen);
}

/*
 * Device control strings (ECMA-48 8.3.27) only ask for settings, and libvterm 0.1 answers unknown ones by printing an integer as a string: they become operating system
 * commands, which have the same shape and end. libvterm takes control and intermediate characters between the two bytes that begin one.
 */
static char without_control_strings(struct vm_screen *screen, char byte)
{
    if (byte == ESC)
        screen->escape = true;
    else if (byte >= '0' && byte != DEL) {
        if (screen->escape && byte == 'P')
            byte = ']';
        screen->escape = false;
    }
    return byte;
}

/* Answers that a terminal gives to questions are dropped: nobody types them. */
static void write_terminal(struct vm_screen *screen, const char *data, size_t size_bytes)
{
    char part[256];
    while (size_bytes) {
        size_t count = size_bytes < sizeof part ? size_bytes : sizeof part;
        for (size_t i = 0; i < count; i++)
            part[i] = without_control_strings(screen, data[i]);
        vterm_input_write(screen->terminal, part, count);
        while (vterm_output_read(screen->terminal, part, sizeof part))
            continue;
        data += count;
        size_bytes -= count;
    }
}

void vm_screen_feed(struct vm_screen *screen, const char *data, size_t size_bytes)
{
    pthread_mutex_lock(&screen->lock);
    for (size_t i = 0; i < size_bytes; i++)
        screen->recent[screen->recent_total++ % VM_SCREEN_RECENT_BYTES] = data[i];
    if (screen->terminal)
        write_terminal(screen, data, size_bytes);
    pthread_mutex_unlock(&screen->lock);
}

static size_t copy_recent(const struct vm_screen *screen, char data[VM_SCREEN_RECENT_BYTES])
{
    size_t count = screen->recent_total < VM_SCREEN_RECENT_BYTES ? (size_t)screen->recent_total : VM_SCREEN_RECENT_BYTES;
    for (size_t i = 0; i < count; i++)
        data[i] = screen->recent[(screen->recent_total - count + i) % VM_SCREEN_RECENT_BYTES];
    return count;
}

size_t vm_screen_recent(struct vm_screen *screen, char data[VM_SCREEN_RECENT_BYTES])
{
    pthread_mutex_lock(&screen->lock);
    size_t count = copy_recent(screen, data);
    pthread_mutex_unlock(&screen->lock);
    return count;
}

static int property_set(VTermProp property, VTermValue *value, void *ctx)
{
    struct vm_screen *screen = ctx;
    if (property == VTERM_PROP_CURSORVISIBLE)
        screen->hidden = !value->boolean;
    return 1;
}

static int make_terminal(struct vm_screen *screen)
{
    char recent[VM_SCREEN_RECENT_BYTES];
    static const VTermScreenCallbacks callbacks = {.settermprop = property_set};
    int r = vm_screen_prepare(NULL);
    if (r)
        return r;
    screen->terminal = vterm_new(ROWS, COLUMNS);
    if (!screen->terminal)
        return -ENOMEM;
    vterm_set_utf8(screen->terminal, 1);
    screen->cells = vterm_obtain_screen(screen->terminal);
    vterm_screen_set_callbacks(screen->cells, &callbacks, screen);
    vterm_screen_enable_altscreen(screen->cells, 1);
    vterm_screen_reset(screen->cells, 1);
    write_terminal(screen, recent, copy_recent(screen, recent));
    return 0;
}

/* ---- one line ---- */

/* Appends as UTF-8; what XML must not have is a blank. */
static size_t put_character(char *to, uint32_t c)
{
    if (c < 0x20 || (c >= 0x7f && c < 0xa0) || (c >= 0xd800 && c < 0xe000) || (c & 0xfffe) == 0xfffe || c > 0x10ffff)
        c = ' ';
    if (c < 0x80) {
        to[0] = (char)c;
        return 1;
    }
    unsigned more = c < 0x800 ? 1 : c < 0x10000 ? 2 : 3;
    static const uint8_t lead[] = {0, 0xc0, 0xe0, 0xf0};
    to[0] = (char)(lead[more] | c >> 6 * more);
    for (unsigned i = 1; i <= more; i++)
        to[i] = (char)(0x80 | (c >> 6 * (more - i) & 0x3f));
    return more + 1;
}

#define CELL_BYTES_MAX (4u * VTERM_MAX_CHARS_PER_CELL)

/* The text of one cell and how many columns it takes. */
static size_t put_cell(const VTermScreenCell *cell, char *to)
{
    size_t length = 0;
    for (unsigned i = 0; i < VTERM_MAX_CHARS_PER_CELL && cell->chars[i]; i++)
        length += put_character(to + length, cell->chars[i]);
    return length ? length : put_character(to, ' ');
}

static int get_cell(const struct vm_screen *screen, int row, int column, VTermScreenCell *cell)
{
    if (!vterm_screen_get_cell(screen->cells, (VTermPos){.row = row, .col = column}, cell))
        *cell = (VTermScreenCell){.width = 1};
    return cell->width > 0 ? cell->width : 1;
}

static void line_text(const struct vm_screen *screen, int row, char text[COLUMNS * CELL_BYTES_MAX + 1])
{
    VTermScreenCell cell;
    size_t length = 0;
    for (int column = 0; column < COLUMNS; column += get_cell(screen, row, column, &cell)) {
        get_cell(screen, row, column, &cell);
        length += put_cell(&cell, text + length);
    }
    while (length && text[length - 1] == ' ')
        length--;
    text[length] = '\0';
}

/* ---- all of it ---- */

static VTermPos cursor_of(const struct vm_screen *screen)
{
    VTermPos at;
    vterm_state_get_cursorpos(vterm_obtain_state(screen->terminal), &at);
    return at;
}

static char *as_text(struct vm_screen *screen)
{
    char line[COLUMNS * CELL_BYTES_MAX + 1], *text = NULL;
    size_t size;
    FILE *out = open_memstream(&text, &size);
    for (int row = 0; out && row < ROWS; row++) {
        line_text(screen, row, line);
        fprintf(out, "%s\n", line);
    }
    if (out)
        fclose(out);
    return text;
}

static char *as_json(struct vm_screen *screen)
{
    char line[COLUMNS * CELL_BYTES_MAX + 1];
    VTermPos cursor = cursor_of(screen);
    json_t *lines = json_array();
    for (int row = 0; row < ROWS; row++) {
        line_text(screen, row, line);
        json_array_append_new(lines, json_string(line));
    }
    json_t *object = json_pack("{s:i, s:i, s:{s:i, s:i, s:b}, s:o}", "rows", ROWS, "columns", COLUMNS, "cursor", "row", cursor.row, "column", cursor.col, "visible",
                               !screen->hidden, "lines", lines);
    char *text = object ? json_dumps(object, JSON_COMPACT) : NULL;
    json_decref(object);
    return text;
}

static uint32_t rgb(const struct vm_screen *screen, VTermColor color, uint32_t usual)
{
    if (VTERM_COLOR_IS_DEFAULT_FG(&color) || VTERM_COLOR_IS_DEFAULT_BG(&color))
        return usual;
    vterm_screen_convert_color_to_rgb(screen->cells, &color);
    return (uint32_t)color.rgb.red << 16 | (uint32_t)color.rgb.green << 8 | color.rgb.blue;
}

struct look {
    uint32_t ink, paper;
    bool bold, underline;
};

static struct look look_of(const struct vm_screen *screen, const VTermScreenCell *cell, bool cursor)
{
    struct look look = {rgb(screen, cell->fg, INK), rgb(screen, cell->bg, PAPER), cell->attrs.bold, cell->attrs.underline != 0};
    if (cell->attrs.reverse != cursor)
        look = (struct look){look.paper, look.ink, look.bold, look.underline};
    return look;
}

static void draw_run(FILE *out, const struct look *look, int row, int column, int width, const char *text)
{
    int x = column * CELL_WIDTH, y = row * CELL_HEIGHT;
    if (look->paper != PAPER)
        fprintf(out, "<rect x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\" fill=\"#%06x\"/>\n", x, y, width * CELL_WIDTH, CELL_HEIGHT, look->paper);
    if (strspn(text, " ") == strlen(text) && !look->underline)
        return;
    fprintf(out, "<text x=\"%d\" y=\"%d\" textLength=\"%d\" fill=\"#%06x\"%s%s>", x, y + BASELINE, width * CELL_WIDTH, look->ink, look->bold ? " font-weight=\"bold\"" : "",
            look->underline ? " text-decoration=\"underline\"" : "");
    for (; *text; text++) {
        static const char special[] = "&<>";
        static const char *const names[] = {"&amp;", "&lt;", "&gt;"};
        const char *found = strchr(special, *text);
        if (found)
            fputs(names[found - special], out);
        else
            fputc(*text, out);
    }
    fputs("</text>\n", out);
}

/* Cells of the same look are one run. */
static void draw_line(const struct vm_screen *screen, FILE *out, int row, VTermPos cursor)
{
    char text[COLUMNS * CELL_BYTES_MAX + 1];
    struct look look = {0};
    size_t length = 0;
    int begin = 0, column = 0;
    while (column < COLUMNS) {
        VTermScreenCell cell;
        int width = get_cell(screen, row, column, &cell);
        struct look now = look_of(screen, &cell, !screen->hidden && row == cursor.row && column == cursor.col);
        if (length && (now.ink != look.ink || now.paper != look.paper || now.bold != look.bold || now.underline != look.underline)) {
            text[length] = '\0';
            draw_run(out, &look, row, begin, column - begin, text);
            length = 0;
        }
        if (!length)
            begin = column;
        look = now;
        length += put_cell(&cell, text + length);
        column += width;
    }
    text[length] = '\0';
    draw_run(out, &look, row, begin, column - begin, text);
}

static char *as_svg(struct vm_screen *screen)
{
    char *text = NULL;
    size_t size;
    VTermPos cursor = cursor_of(screen);
    FILE *out = open_memstream(&text, &size);
    if (!out)
        return NULL;
    fprintf(out,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" font-family=\"monospace\" font-size=\"13\" xml:space=\"preserve\">\n"
            "<rect width=\"100%%\" height=\"100%%\" fill=\"#%06x\"/>\n",
            COLUMNS * CELL_WIDTH, ROWS * CELL_HEIGHT, PAPER);
    for (int row = 0; row < ROWS; row++)
        draw_line(screen, out, row, cursor);
    fputs("</svg>\n", out);
    fclose(out);
    return text;
}

static const struct {
    const char *name, *content_type;
    char *(*render)(struct vm_screen *screen);
} formats[] = {
    {"json", "application/json", as_json},
    {"text", "text/plain; charset=utf-8", as_text},
    {"svg", "image/svg+xml", as_svg},
};

char *vm_screen_render(struct vm_screen *screen, const char *format, const char **content_type)
{
    char *text = NULL;
    *content_type = NULL;
    pthread_mutex_lock(&screen->lock);
    for (size_t i = 0; i < sizeof formats / sizeof *formats && !*content_type; i++) {
        if (strcmp(formats[i].name, format))
            continue;
        *content_type = formats[i].content_type;
        if (screen->terminal || make_terminal(screen) == 0)
            text = formats[i].render(screen);
    }
    pthread_mutex_unlock(&screen->lock);
    return text;
}
