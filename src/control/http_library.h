/* libmicrohttpd (util/library.h): it needs GnuTLS, and with what that needs in turn it takes some 2 ms. */
#ifndef DOPPEL_CONTROL_HTTP_LIBRARY_H
#define DOPPEL_CONTROL_HTTP_LIBRARY_H

#include <microhttpd.h>

#include "util/library.h"

#define HTTP_FUNCTIONS(EACH) \
    EACH(MHD_add_response_header) \
    EACH(MHD_create_response_from_buffer) \
    EACH(MHD_create_response_from_callback) \
    EACH(MHD_destroy_response) \
    EACH(MHD_get_connection_info) \
    EACH(MHD_get_daemon_info) \
    EACH(MHD_get_timeout) \
    EACH(MHD_lookup_connection_value) \
    EACH(MHD_lookup_connection_value_n) \
    EACH(MHD_queue_response) \
    EACH(MHD_resume_connection) \
    EACH(MHD_run) \
    EACH(MHD_start_daemon) \
    EACH(MHD_stop_daemon) \
    EACH(MHD_suspend_connection)

struct http_library {
#define MEMBER(name) __typeof__(name) *name;
    HTTP_FUNCTIONS(MEMBER)
#undef MEMBER
};

extern struct http_library http_library; /* all NULL before it is loaded */
extern struct library http_library_file;

#ifndef HTTP_LIBRARY_NAMES
#define MHD_add_response_header http_library.MHD_add_response_header
#define MHD_create_response_from_buffer http_library.MHD_create_response_from_buffer
#define MHD_create_response_from_callback http_library.MHD_create_response_from_callback
#define MHD_destroy_response http_library.MHD_destroy_response
#define MHD_get_connection_info http_library.MHD_get_connection_info
#define MHD_get_daemon_info http_library.MHD_get_daemon_info
#define MHD_get_timeout http_library.MHD_get_timeout
#define MHD_lookup_connection_value http_library.MHD_lookup_connection_value
#define MHD_lookup_connection_value_n http_library.MHD_lookup_connection_value_n
#define MHD_queue_response http_library.MHD_queue_response
#define MHD_resume_connection http_library.MHD_resume_connection
#define MHD_run http_library.MHD_run
#define MHD_start_daemon http_library.MHD_start_daemon
#define MHD_stop_daemon http_library.MHD_stop_daemon
#define MHD_suspend_connection http_library.MHD_suspend_connection
#endif

#endif
