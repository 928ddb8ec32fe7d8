/* ncurses (util/library.h): it and the library below it take some 0.3 ms. Without its macros, which mean the standard screen, a variable of the library. */
#ifndef DOPPEL_CLI_CURSES_LIBRARY_H
#define DOPPEL_CLI_CURSES_LIBRARY_H

#define NCURSES_NOMACROS
#include <curses.h>

#include "util/library.h"

#define CURSES_FUNCTIONS(EACH) \
    EACH(cbreak) \
    EACH(curs_set) \
    EACH(endwin) \
    EACH(getmaxx) \
    EACH(getmaxy) \
    EACH(initscr) \
    EACH(mvwprintw) \
    EACH(noecho) \
    EACH(wattr_off) \
    EACH(wattr_on) \
    EACH(werase) \
    EACH(wgetch) \
    EACH(wrefresh) \
    EACH(wtimeout)

struct curses_library {
#define MEMBER(name) __typeof__(name) *name;
    CURSES_FUNCTIONS(MEMBER)
#undef MEMBER
};

extern struct curses_library curses_library; /* all NULL before it is loaded */
extern struct library curses_library_file;

#ifndef CURSES_LIBRARY_NAMES
#define cbreak curses_library.cbreak
#define curs_set curses_library.curs_set
#define endwin curses_library.endwin
#define getmaxx curses_library.getmaxx
#define getmaxy curses_library.getmaxy
#define initscr curses_library.initscr
#define mvwprintw curses_library.mvwprintw
#define noecho curses_library.noecho
#define wattr_off curses_library.wattr_off
#define wattr_on curses_library.wattr_on
#define werase curses_library.werase
#define wgetch curses_library.wgetch
#define wrefresh curses_library.wrefresh
#define wtimeout curses_library.wtimeout
#endif

#endif
