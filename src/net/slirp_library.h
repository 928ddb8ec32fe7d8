/* libslirp (util/library.h): with GLib, which it needs, it takes some 0.5 ms, and only user networking needs it. */
#ifndef DOPPEL_NET_SLIRP_LIBRARY_H
#define DOPPEL_NET_SLIRP_LIBRARY_H

#include <slirp/libslirp.h>

#include "util/library.h"

#define SLIRP_FUNCTIONS(EACH) \
    EACH(slirp_add_hostfwd) \
    EACH(slirp_cleanup) \
    EACH(slirp_connection_info) \
    EACH(slirp_handle_timer) \
    EACH(slirp_input) \
    EACH(slirp_new) \
    EACH(slirp_pollfds_fill) \
    EACH(slirp_pollfds_poll)

struct slirp_library {
#define MEMBER(name) __typeof__(name) *name;
    SLIRP_FUNCTIONS(MEMBER)
#undef MEMBER
};

extern struct slirp_library slirp_library; /* all NULL before it is loaded */
extern struct library slirp_library_file;

#ifndef SLIRP_LIBRARY_NAMES
#define slirp_add_hostfwd slirp_library.slirp_add_hostfwd
#define slirp_cleanup slirp_library.slirp_cleanup
#define slirp_connection_info slirp_library.slirp_connection_info
#define slirp_handle_timer slirp_library.slirp_handle_timer
#define slirp_input slirp_library.slirp_input
#define slirp_new slirp_library.slirp_new
#define slirp_pollfds_fill slirp_library.slirp_pollfds_fill
#define slirp_pollfds_poll slirp_library.slirp_pollfds_poll
#endif

#endif
