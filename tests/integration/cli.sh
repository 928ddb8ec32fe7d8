#!/bin/sh
# cli.sh DOPPEL: what bad input gets. Each case must end with status 2 and one line that mentions the thing.
set -u
doppel=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0

# refuse MENTION OPTIONS...
refuse() {
    mention=$1
    shift
    timeout 20 "$doppel" "$@" </dev/null >"$work/out" 2>"$work/err"
    status=$?
    lines=$(wc -l <"$work/err")
    if [ "$status" -ne 2 ] || [ "$lines" -ne 1 ] || ! grep -qF -- "$mention" "$work/err"; then
        echo "FAIL: doppel $* -> status $status, $lines lines, wanted 2, 1 line with \"$mention\":"
        cat "$work/err"
        failures=$((failures + 1))
    fi
}

head -c 3000000 /dev/urandom >"$work/noise"
head -c 100 /dev/urandom >"$work/short"
: >"$work/empty"
truncate -s 1M "$work/disk"
truncate -s 1000 "$work/odd"
printf '{"kernel": 1, "colour": 2}' >"$work/bad.json"
printf '[1]' >"$work/list.json"
{ printf '{"a": "'; head -c 51200 /dev/zero | tr '\0' x; printf '"}'; } >"$work/large.json"
# A bzImage header with nothing behind it.
{ head -c 497 /dev/zero; printf '\004'; head -c 12 /dev/zero; printf '\125\252\353\156HdrS\017\002'; head -c 1000 /dev/zero; } >"$work/truncated"

# What cannot be printed is an error; what was closed is not taken by another file.
for command in "ps --all --json" "help" "manual" "version" "completion bash"; do
    if timeout 20 "$doppel" $command >/dev/full 2>"$work/err" || ! grep -q "cannot write to standard output: No space left" "$work/err"; then
        echo "FAIL: doppel $command on a full disk"
        failures=$((failures + 1))
    fi
done
XDG_RUNTIME_DIR="$work" "$doppel" events --follow <&- >&- 2>&- &
follower=$!
tries=0
until [ "$(readlink "/proc/$follower/fd/0")" = /dev/null ] && [ "$(readlink "/proc/$follower/fd/1")" = /dev/null ] && [ "$(readlink "/proc/$follower/fd/2")" = /dev/null ]; do
    tries=$((tries + 1))
    if [ $tries = 100 ]; then
        echo "FAIL: closed standard streams are $(ls -l "/proc/$follower/fd" 2>&1)"
        failures=$((failures + 1))
        break
    fi
    sleep 0.05
done
kill $follower
for command in help completion manual version; do
    if ! timeout 20 "$doppel" $command --help | grep -q "^usage: doppel $command"; then
        echo "FAIL: doppel $command --help"
        failures=$((failures + 1))
    fi
done
refuse "unexpected argument" version now
refuse "unknown command" walk
refuse "unknown option" run --colour red
refuse "unexpected argument" run vmlinuz
refuse "no kernel" run
refuse "needs a value" run --kernel
refuse "$work/missing" run --kernel "$work/missing"
refuse "$work" run --kernel "$work"
refuse "$work/noise" run --kernel "$work/noise"
refuse "$work/short" run --kernel "$work/short"
refuse "$work/empty" run --kernel "$work/empty"
refuse "$work/truncated" run --kernel "$work/truncated"
refuse "not a size" run --kernel x --memory many
refuse "too small" run --kernel x --memory 4K
refuse "host" run --kernel x --memory 900T
refuse "cpus" run --kernel x --cpus 0
refuse "warp" run --kernel x --engine warp
refuse "zz" run --kernel x --dump-code zz
refuse "phys:" run --kernel x --dump-code phys:
refuse "11223344556677889" run --kernel x --dump-code 11223344556677889
refuse "perf-map" run --kernel x --perf-map=maybe
refuse "colour" run --config "$work/bad.json"
refuse "$work/none.json" run --config "$work/none.json"
refuse "is a directory" run --config "$work"
refuse "$work/noise" run --config "$work/noise"
refuse "$work/nodisk" run --kernel x --disk "$work/nodisk"
refuse "$work" run --kernel x --disk "$work"
refuse "512" run --kernel x --disk "$work/odd"
refuse "format" run --kernel x --disk "$work/disk,format=vhd"
refuse "pigeon" run --kernel x --net pigeon
refuse "no file" run --kernel x --metadata ""
refuse "version=3" run --kernel x --metadata "$work/list.json,version=3"
refuse "address=10.0.0.1" run --kernel x --metadata "$work/list.json,address=10.0.0.1"
refuse "$work/list.json: " run --kernel x --metadata "$work/list.json"
refuse "$work/large.json: " run --kernel x --metadata "$work/large.json"
refuse "$work/noise" run --kernel x --metadata "$work/noise"
refuse "$work/none.json" run --kernel x --metadata "$work/none.json"
refuse "is a directory" run --kernel x --metadata "$work"
refuse "forward" run --kernel x --net user,forward=tcp:nonsense
refuse "nosuchtap" run --kernel x --net tap:nosuchtap0123
refuse "$work/no/trace" run --kernel "$work/noise" --trace "$work/no/trace"


if [ -n "${DOPPEL_KERNEL:-}" ] && [ -f "${DOPPEL_KERNEL:-}" ]; then
    refuse "memory" run --kernel "$DOPPEL_KERNEL" --memory 8M
    refuse "$work/missing" run --kernel "$DOPPEL_KERNEL" --initrd "$work/missing"
    truncate -s 300M "$work/big"
    refuse "initrd" run --kernel "$DOPPEL_KERNEL" --initrd "$work/big" --memory 256M
    head -c 2000000 "$DOPPEL_KERNEL" >"$work/half"
    refuse "$work/half" run --kernel "$work/half"
    refuse "/nonexistent/console" run --kernel "$DOPPEL_KERNEL" --console file:/nonexistent/console
fi

for words in "--help" "help" "run --help" "help run" "version" "--version" "completion bash" "completion zsh" "completion fish" "manual"; do
    # shellcheck disable=SC2086
    if ! "$doppel" $words >"$work/out" 2>&1 || [ ! -s "$work/out" ]; then
        echo "FAIL: doppel $words"
        failures=$((failures + 1))
    fi
done
"$doppel" completion bash | bash -n || failures=$((failures + 1))

[ "$failures" -eq 0 ] || exit 1
echo "all refused as they should be"
