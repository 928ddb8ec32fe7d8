/* libarchive (util/library.h): it and what it needs in turn take some 3 ms. */
#ifndef DOPPEL_CLI_ARCHIVE_LIBRARY_H
#define DOPPEL_CLI_ARCHIVE_LIBRARY_H

#include <archive.h>
#include <archive_entry.h>

#define ARCHIVE_FUNCTIONS(EACH) \
    EACH(archive_entry_filetype) \
    EACH(archive_entry_free) \
    EACH(archive_entry_hardlink) \
    EACH(archive_entry_new) \
    EACH(archive_entry_pathname) \
    EACH(archive_entry_set_filetype) \
    EACH(archive_entry_set_mtime) \
    EACH(archive_entry_set_pathname) \
    EACH(archive_entry_set_perm) \
    EACH(archive_entry_set_size) \
    EACH(archive_entry_size) \
    EACH(archive_entry_size_is_set) \
    EACH(archive_entry_sparse_add_entry) \
    EACH(archive_entry_sparse_clear) \
    EACH(archive_error_string) \
    EACH(archive_filter_bytes) \
    EACH(archive_read_data) \
    EACH(archive_read_data_block) \
    EACH(archive_read_data_into_fd) \
    EACH(archive_read_free) \
    EACH(archive_read_new) \
    EACH(archive_read_next_header) \
    EACH(archive_read_open_filename) \
    EACH(archive_read_support_filter_zstd) \
    EACH(archive_read_support_format_tar) \
    EACH(archive_write_add_filter_zstd) \
    EACH(archive_write_close) \
    EACH(archive_write_data) \
    EACH(archive_write_free) \
    EACH(archive_write_header) \
    EACH(archive_write_new) \
    EACH(archive_write_open_fd) \
    EACH(archive_write_set_bytes_in_last_block) \
    EACH(archive_write_set_filter_option) \
    EACH(archive_write_set_format_pax_restricted)

struct archive_library {
#define MEMBER(name) __typeof__(name) *name;
    ARCHIVE_FUNCTIONS(MEMBER)
#undef MEMBER
};

extern struct archive_library archive_library; /* all NULL before */
/* An exit status, after a message. Again: nothing. */
int archive_library_load(void);

#ifndef ARCHIVE_LIBRARY_NAMES
#define archive_entry_filetype archive_library.archive_entry_filetype
#define archive_entry_free archive_library.archive_entry_free
#define archive_entry_hardlink archive_library.archive_entry_hardlink
#define archive_entry_new archive_library.archive_entry_new
#define archive_entry_pathname archive_library.archive_entry_pathname
#define archive_entry_set_filetype archive_library.archive_entry_set_filetype
#define archive_entry_set_mtime archive_library.archive_entry_set_mtime
#define archive_entry_set_pathname archive_library.archive_entry_set_pathname
#define archive_entry_set_perm archive_library.archive_entry_set_perm
#define archive_entry_set_size archive_library.archive_entry_set_size
#define archive_entry_size archive_library.archive_entry_size
#define archive_entry_size_is_set archive_library.archive_entry_size_is_set
#define archive_entry_sparse_add_entry archive_library.archive_entry_sparse_add_entry
#define archive_entry_sparse_clear archive_library.archive_entry_sparse_clear
#define archive_error_string archive_library.archive_error_string
#define archive_filter_bytes archive_library.archive_filter_bytes
#define archive_read_data archive_library.archive_read_data
#define archive_read_data_block archive_library.archive_read_data_block
#define archive_read_data_into_fd archive_library.archive_read_data_into_fd
#define archive_read_free archive_library.archive_read_free
#define archive_read_new archive_library.archive_read_new
#define archive_read_next_header archive_library.archive_read_next_header
#define archive_read_open_filename archive_library.archive_read_open_filename
#define archive_read_support_filter_zstd archive_library.archive_read_support_filter_zstd
#define archive_read_support_format_tar archive_library.archive_read_support_format_tar
#define archive_write_add_filter_zstd archive_library.archive_write_add_filter_zstd
#define archive_write_close archive_library.archive_write_close
#define archive_write_data archive_library.archive_write_data
#define archive_write_free archive_library.archive_write_free
#define archive_write_header archive_library.archive_write_header
#define archive_write_new archive_library.archive_write_new
#define archive_write_open_fd archive_library.archive_write_open_fd
#define archive_write_set_bytes_in_last_block archive_library.archive_write_set_bytes_in_last_block
#define archive_write_set_filter_option archive_library.archive_write_set_filter_option
#define archive_write_set_format_pax_restricted archive_library.archive_write_set_format_pax_restricted
#endif

#endif
