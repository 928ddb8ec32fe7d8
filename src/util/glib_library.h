/* GLib (util/library.h): metadata's tokens and OVF's descriptions. With what it needs it takes some 0.3 ms. */
#ifndef DOPPEL_UTIL_GLIB_LIBRARY_H
#define DOPPEL_UTIL_GLIB_LIBRARY_H

#include <glib.h>

#include "util/library.h"

#undef g_free /* newer ones have macros of these names */
#undef g_clear_error
#undef g_set_error
#define GLIB_FUNCTIONS(EACH) \
    EACH(g_ascii_table) \
    EACH(g_ascii_tolower) \
    EACH(g_clear_error) \
    EACH(g_compute_hmac_for_data) \
    EACH(g_free) \
    EACH(g_markup_error_quark) \
    EACH(g_markup_parse_context_end_parse) \
    EACH(g_markup_parse_context_free) \
    EACH(g_markup_parse_context_new) \
    EACH(g_markup_parse_context_parse) \
    EACH(g_set_error)

struct glib_library {
#define MEMBER(name) __typeof__(name) *name;
    GLIB_FUNCTIONS(MEMBER)
#undef MEMBER
};

extern struct glib_library glib_library; /* all NULL before it is loaded */
extern struct library glib_library_file;

#ifndef GLIB_LIBRARY_NAMES
#define g_ascii_table (*glib_library.g_ascii_table)
#define g_ascii_tolower glib_library.g_ascii_tolower
#define g_clear_error glib_library.g_clear_error
#define g_compute_hmac_for_data glib_library.g_compute_hmac_for_data
#define g_free glib_library.g_free
#define g_markup_error_quark glib_library.g_markup_error_quark
#define g_markup_parse_context_end_parse glib_library.g_markup_parse_context_end_parse
#define g_markup_parse_context_free glib_library.g_markup_parse_context_free
#define g_markup_parse_context_new glib_library.g_markup_parse_context_new
#define g_markup_parse_context_parse glib_library.g_markup_parse_context_parse
#define g_set_error glib_library.g_set_error
#endif

#endif
