#!/bin/sh
# jobs.sh NAME VARIANT: one piece of the mixed load, in an empty directory. What it prints depends on the name and the variant only, so the same on every machine.
# SOAK_SERVER is HOST:PORT of the server for the transfers (../server.py).
set -eu
jobs=$(dirname -- "$0")
variant=$2
optimize="-O$((variant % 3 + 1))"

# Numbered lines of words, for whatever takes text.
text() {
    mawk -v seed="$1" -v lines="$2" 'BEGIN {
        split("quick brown fox jumps over the lazy dog while every quirk of a queer clock wakes seventeen engineers", word, " ")
        x = seed + 12345
        for (line = 0; line < lines; line++) {
            out = ""
            for (i = 0; i < 6; i++) { x = (x * 69069 + 1) % 4294967296; k = int(x / 65536); out = out (i == 1 ? k % 10007 : word[k % 17 + 1]) " " }
            print out k
        }
    }'
}

# Builds PROGRAM.c and runs it with the other arguments.
build_and_run() {
    program=$1
    shift
    gcc $optimize -std=gnu17 -pthread ${bits:+"$bits"} -o "$program" "$jobs/$program.c" -lm
    "./$program" "$@"
}

case $1 in
gcc)
    python3 "$jobs/write_c.py" "$variant" 15 >generated.c
    gcc $optimize -S generated.c
    sha256sum generated.s
    gcc -o generated generated.s
    ./generated
    ;;
gcc-m32)
    python3 "$jobs/write_c.py" "$variant" 8 >generated.c
    gcc $optimize -m32 -S generated.c
    sha256sum generated.s
    gcc -m32 -o generated generated.s
    ./generated
    ;;
make)
    ln -s "$jobs/sources" sources
    ls sources/src/engine/interp/*.c | sort | mawk -v v="$variant" 'NR % 9 == v % 9' >list
    { printf 'all:'; sed 's|.*/\(.*\)\.c|\1.s|' list | tr '\n' ' '; echo
      while read -r file; do
          name=${file##*/}
          printf '%s.s: %s\n\tgcc -std=gnu17 -O2 -Isources/src -Isources/include -mgeneral-regs-only -S -o $@ $<\n' "${name%.c}" "$file"
      done <list; } >Makefile
    make -s -j3
    sha256sum ./*.s
    ;;
threads) build_and_run threads "$variant" ;;
threads-m32) bits=-m32 build_and_run threads "$variant" ;;
edges) build_and_run edges "$variant" ;;
edges-m32) bits=-m32 build_and_run edges "$variant" ;;
codegen) build_and_run codegen "$variant" ;;
float) build_and_run float "$variant" ;;
float-m32) bits=-m32 build_and_run float "$variant" ;;
step) build_and_run step "$variant" ;;
luajit) luajit "$jobs/work.lua" "$variant" ;;
luajit-interpreter) luajit -joff "$jobs/work.lua" "$variant" 1 ;;
node) node "$jobs/work.js" "$variant" ;;
java)
    javac -d . "$jobs/Work.java"
    java -Xmx256m -cp . Work "$variant"
    ;;
python) python3 "$jobs/work.py" "$variant" ;;
perl) perl "$jobs/work.pl" "$variant" ;;
sqlite-memory) python3 "$jobs/write_sql.py" "$variant" | sqlite3 -batch :memory: ;;
sqlite-disk)
    { echo 'pragma journal_mode=wal; pragma synchronous=normal;'; python3 "$jobs/write_sql.py" "$variant"; } | sqlite3 -batch disk.db
    sqlite3 disk.db .dump | sha256sum
    sqlite3 disk.db 'pragma integrity_check; vacuum; pragma integrity_check;'
    ;;
net) python3 "$jobs/net.py" "$variant" "$SOAK_SERVER" ;;
forks)
    i=0
    sum=0
    while [ $i -lt 150 ]; do
        n=$(printf '%s\n' "$((i * variant + 7))" | sed s/7/8/ | tr 1 2)
        sum=$((sum + n))
        (exit $((i % 100))) || sum=$((sum + $?))
        i=$((i + 1))
    done
    echo "$sum"
    seq 100 | xargs -P 4 -n 5 sh -c 'expr $1 + $5 "*" 3' x | sort -n | sha256sum
    for i in 1 2 3 4 5 6 7 8; do sh -c "seq $((i * 1000)) | sort -r | sort -n | tail -1" & done >unsorted
    wait
    sort -n unsorted
    ;;
compress)
    text "$variant" 25000 >text
    head -c 1500000 "$(readlink -f /usr/bin/node)" >data
    for tool in "gzip -n -$((variant % 9 + 1))" "bzip2" "xz -$((variant % 4))" "zstd -q -$((variant % 12 + 1))"; do
        for file in text data; do
            $tool -c <$file >packed
            sha256sum <packed
            ${tool%% *} -dc <packed | cmp - $file
        done
    done
    ;;
text)
    text "$variant" 50000 >text
    sort -k2n -k1 text | sha256sum
    sort -S 4M -r --parallel=2 text | uniq -c | sha256sum
    grep -E -c '(qu[a-z]*k|cl.ck).*[0-9]5 .*(y|q[^ ]*) ' text
    sed -E 's/([a-z]+) ([0-9]+)/\2 \1/; s/q(.)/\1Q/g' text | md5sum
    mawk '{ n[$1] += $2; l[length($3)]++ } END { for (w in n) print w, n[w]; for (w in l) print w, l[w] }' text | sort
    tr a-m n-z <text | cut -d' ' -f2-4 | paste - - - | wc
    ;;
hash)
    for file in /usr/bin/node /usr/bin/gcc /usr/lib/x86_64-linux-gnu/libc.so.6; do
        for tool in cksum md5sum sha1sum sha224sum sha256sum sha384sum sha512sum b2sum; do
            $tool <$file
        done
    done
    ;;
openssl)
    for digest in md5 sha1 sha256 sha512 sha3-256 blake2b512 sm3; do openssl dgst -$digest </usr/bin/node; done
    for cipher in aes-128-cbc aes-256-ctr chacha20 camellia-256-cbc aria-128-cbc; do
        head -c 6000000 /usr/bin/node | openssl enc -$cipher -K 000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f -iv 000102030405060708090a0b0c0d0e0f 2>/dev/null | sha256sum
    done
    openssl genrsa -out key 2048 2>/dev/null
    openssl rsa -in key -pubout -out public 2>/dev/null
    openssl ecparam -name prime256v1 -genkey -noout -out eckey
    openssl ec -in eckey -pubout -out ecpublic 2>/dev/null
    for i in 1 2 3 4 5; do
        echo "$variant $i" >message
        openssl dgst -sha256 -sign key -out signature message && openssl dgst -sha256 -verify public -signature signature message
        openssl dgst -sha256 -sign eckey -out signature message && openssl dgst -sha256 -verify ecpublic -signature signature message
    done
    ;;
files) python3 "$jobs/files.py" "$variant" ;;
tree)
    cp -r /usr/share/perl /usr/lib/python3.11/json copied 2>/dev/null || { mkdir copied && cp -r /usr/share/perl /usr/lib/python3.11/json copied; }
    (cd copied && find . -type f | sort | xargs sha256sum | sha256sum)
    tar -C copied --sort=name --mtime=@0 --owner=0 --group=0 -cf - . | sha256sum
    tar -C copied -cf packed.tar . && mkdir unpacked && tar -C unpacked -xf packed.tar && diff -r copied unpacked && echo same
    find copied -name '*.p[lm]' -exec wc -l {} + | tail -1
    rm -r copied unpacked
    ls
    ;;
strace) strace -f -o trace sh -c 'i=0; while [ $i -lt 60 ]; do (echo $i); i=$((i + 1)); done; ls / | wc -l >/dev/null' && grep -c 'exited with 0' trace ;;
bc) echo "scale=$((900 + variant)); 4*a(1); e(1); l(2)" | bc -l ;;
*)
    echo "no job $1" >&2
    exit 2
    ;;
esac
