/* ncurses, loaded when it is needed (curses_library.h). */
#define CURSES_LIBRARY_NAMES /* the functions' own */
#include "cli/curses_library.h"

struct curses_library curses_library;

static const struct library_name names[] = {
#define ENTRY(name) {#name, offsetof(struct curses_library, name)},
    CURSES_FUNCTIONS(ENTRY)
#undef ENTRY
};

struct library curses_library_file = {.file = "libncursesw.so.6", .package = "libncursesw6", .name = names, .count = sizeof names / sizeof *names, .table = &curses_library};
