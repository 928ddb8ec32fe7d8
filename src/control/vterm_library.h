/* libvterm (util/library.h): only machines whose screen somebody may ask for need it. */
#ifndef DOPPEL_CONTROL_VTERM_LIBRARY_H
#define DOPPEL_CONTROL_VTERM_LIBRARY_H

#include <vterm.h>

#include "util/library.h"

#define VTERM_FUNCTIONS(EACH) \
    EACH(vterm_free) \
    EACH(vterm_input_write) \
    EACH(vterm_new) \
    EACH(vterm_obtain_screen) \
    EACH(vterm_obtain_state) \
    EACH(vterm_output_read) \
    EACH(vterm_screen_convert_color_to_rgb) \
    EACH(vterm_screen_enable_altscreen) \
    EACH(vterm_screen_get_cell) \
    EACH(vterm_screen_reset) \
    EACH(vterm_screen_set_callbacks) \
    EACH(vterm_set_utf8) \
    EACH(vterm_state_get_cursorpos)

struct vterm_library {
#define MEMBER(name) __typeof__(name) *name;
    VTERM_FUNCTIONS(MEMBER)
#undef MEMBER
};

extern struct vterm_library vterm_library; /* all NULL before it is loaded */
extern struct library vterm_library_file;

#ifndef VTERM_LIBRARY_NAMES
#define vterm_free vterm_library.vterm_free
#define vterm_input_write vterm_library.vterm_input_write
#define vterm_new vterm_library.vterm_new
#define vterm_obtain_screen vterm_library.vterm_obtain_screen
#define vterm_obtain_state vterm_library.vterm_obtain_state
#define vterm_output_read vterm_library.vterm_output_read
#define vterm_screen_convert_color_to_rgb vterm_library.vterm_screen_convert_color_to_rgb
#define vterm_screen_enable_altscreen vterm_library.vterm_screen_enable_altscreen
#define vterm_screen_get_cell vterm_library.vterm_screen_get_cell
#define vterm_screen_reset vterm_library.vterm_screen_reset
#define vterm_screen_set_callbacks vterm_library.vterm_screen_set_callbacks
#define vterm_set_utf8 vterm_library.vterm_set_utf8
#define vterm_state_get_cursorpos vterm_library.vterm_state_get_cursorpos
#endif

#endif
