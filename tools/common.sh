# Sourced by ./demo, ./check and the tools: where things are, progress, installing packages, building. POSIX sh.

root=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
while [ ! -f "$root/meson.build" ] && [ "$root" != / ]; do root=$(dirname -- "$root"); done
cache=${DOPPEL_CACHE:-$root/.cache}
build=$root/build
agent=${DOPPEL_AGENT:-$build/src/agent/doppel-agent}

BUILD_PACKAGES="gcc libc6-dev meson ninja-build pkg-config libzydis-dev libjansson-dev libslirp-dev libglib2.0-dev liburing-dev
    liblzma-dev libzstd-dev liblz4-dev libdeflate-dev libmicrohttpd-dev libvterm-dev libseccomp-dev libncurses-dev libxxhash-dev libarchive-dev libgnutls28-dev"
DEMO_PACKAGES="busybox-static cpio kmod"
DEBIAN_PACKAGES="mmdebstrap e2fsprogs"
TEST_PACKAGES="libcmocka-dev openssl g++ clang libclang-rt-14-dev llvm busybox-static cpio kmod expect socat e2fsprogs mmdebstrap python3 iproute2 curl binutils acpica-tools qemu-utils"

say() {
    printf '\033[1m==>\033[0m %s\n' "$*" >&2
}

die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# As root, through sudo when need be.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "this needs root: run it as root, or install sudo ($*)"
    fi
}

# Installs those of the named packages that are missing.
install_packages() {
    missing=
    for package in "$@"; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
    done
    [ -n "$missing" ] || return 0
    [ "$(id -u)" -eq 0 ] || command -v sudo >/dev/null ||
        die "some packages are missing and this user is not root and has no sudo; as root: apt-get install$missing"
    say "installing$missing"
    as_root apt-get -qq update >&2 || die "apt-get update failed; is the network up?"
    # shellcheck disable=SC2086
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $missing >"${TMPDIR:-/tmp}/doppel-apt.$$" 2>&1 || {
        cat "${TMPDIR:-/tmp}/doppel-apt.$$" >&2
        die "installing packages failed"
    }
    rm -f "${TMPDIR:-/tmp}/doppel-apt.$$"
}

# The mirror that this host itself uses.
debian_mirror() {
    mirror=$(sed -n 's/^URIs: *\([^ ]*debian\) *$/\1/p; s/^deb \(\[[^]]*\] \)\{0,1\}\([^ ]*debian\/\{0,1\}\) .*/\2/p' \
        /etc/apt/sources.list /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list 2>/dev/null | head -n 1)
    echo "${mirror:-http://deb.debian.org/debian}"
}

build_doppel() {
    say "building build/doppel$([ -f "$build/build.ninja" ] || echo ' (a minute, the first time)')"
    if [ ! -f "$build/build.ninja" ]; then
        meson setup "$build" "$root" "$@" >"$build.log" 2>&1 || { cat "$build.log" >&2; die "meson failed"; }
        rm -f "$build.log"
    fi
    ninja -C "$build" --quiet >&2 || die "the build failed"
}

# Debian's cloud kernel, unpacked under $cache/kernel; sets $kernel and $modules.
get_kernel() {
    if [ ! -f "$cache/kernel/complete" ]; then
        say "getting Debian's kernel (linux-image-cloud-amd64)"
        mkdir -p "$cache/download"
        apt-cache show linux-image-cloud-amd64 >/dev/null 2>&1 || as_root apt-get -qq update >&2
        image=$(apt-cache show linux-image-cloud-amd64 | sed -n 's/^Depends: .*\(linux-image-[^ ,]*-cloud-amd64\).*/\1/p' | head -n 1)
        [ -n "$image" ] || die "apt knows no linux-image-cloud-amd64; run apt-get update"
        (cd "$cache/download" && rm -f linux-image-*.deb && apt-get -qq -o APT::Sandbox::User=root download "$image" >&2) || die "downloading $image failed"
        rm -rf "$cache/kernel"
        dpkg-deb -x "$cache"/download/linux-image-*.deb "$cache/kernel" || die "unpacking the kernel failed"
        touch "$cache/kernel/complete"
    fi
    kernel=$(ls "$cache"/kernel/boot/vmlinuz-* | head -n 1)
    modules=$(ls -d "$cache"/kernel/lib/modules/* | head -n 1)
    [ -f "$modules/modules.dep" ] || /sbin/depmod -b "$cache/kernel" "${modules##*/}"
}

# The initial RAM disk of the demonstration, made again when the tools or the kernel have changed; sets $initrd.
get_initrd() {
    get_kernel
    initrd=$cache/demo-initrd.gz
    [ -f "$initrd" ] && [ -z "$(find "$root/tools" "$cache/kernel/complete" "$agent" -newer "$initrd" -type f 2>/dev/null)" ] && return 0
    say "making the initial RAM disk"
    "$root/tools/make-initramfs" "$initrd"
}

# unpack_packages DIRECTORY PACKAGE...: the packages' files, nothing configured; DIRECTORY is made anew, and says in versions what is in it.
unpack_packages() {
    unpacked=$1
    shift
    rm -rf "$unpacked"
    mkdir -p "$unpacked/debs" "$unpacked/usr/bin" "$unpacked/usr/sbin" "$unpacked/usr/lib" "$unpacked/usr/lib64"
    apt-cache show "$1" >/dev/null 2>&1 || as_root apt-get -qq update >&2
    (cd "$unpacked/debs" && apt-get -qq -o APT::Sandbox::User=root download "$@" >&2) || die "downloading packages failed; try apt-get update"
    # Packages that still name /bin and /lib go where the links point.
    for directory in bin sbin lib lib64; do
        ln -s "usr/$directory" "$unpacked/$directory"
    done
    for deb in "$unpacked"/debs/*.deb; do
        dpkg-deb --fsys-tarfile "$deb" | tar -x --keep-directory-symlink --no-same-owner -C "$unpacked" || die "unpacking $deb failed"
    done
    (cd "$unpacked/debs" && ls ./*.deb | sed 's/^\.\///; s/\.deb$//') >"$unpacked/versions"
    rm -r "$unpacked/debs"
}
