/* libmicrohttpd, loaded when it is needed (http_library.h). */
#define HTTP_LIBRARY_NAMES /* the functions' own */
#include "control/http_library.h"

struct http_library http_library;

static const struct library_name names[] = {
#define ENTRY(name) {#name, offsetof(struct http_library, name)},
    HTTP_FUNCTIONS(ENTRY)
#undef ENTRY
};

struct library http_library_file = {.file = "libmicrohttpd.so.12", .package = "libmicrohttpd12", .name = names, .count = sizeof names / sizeof *names, .table = &http_library};
