#!/bin/sh
# novector.sh LIBINTERP: the interpreter keeps the guest's vector registers in the host's, so its own code must not name one, nor call libc's memory and string
# functions where the compiler put them in (they use vectors).
set -u
if objdump -d "$1" | grep -E '%([xyz]mm|mm|st)[0-9(]' | head -n 5 | grep .; then
    echo "vector code in $1"
    exit 1
fi
if nm -u "$1" 2>/dev/null | grep -wE 'memcpy|memmove|memset|memcmp|strlen|strcpy' | sort -u | grep .; then
    echo "calls of libc memory functions in $1"
    exit 1
fi
