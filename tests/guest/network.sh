#!/bin/sh
# Runs in the guest (tools/make-initramfs OUTPUT tests/guest/network.sh), with user networking. Prints "ok NAME" or "not ok NAME" for each check and at
# the end "network: passed" or "network: failed". The kernel's command line may carry
#     doppel.url=http://10.0.2.2:PORT/FILE doppel.md5=SUM   a file served on the host's loopback, at best some megabytes, to fetch
#     doppel.serve=PORT                                     a port to serve on: the host connects through a forward, and reads "served" in return
failures=0
check() {
    name=$1
    shift
    if "$@" >/tmp/output 2>&1; then
        echo "ok $name"
    else
        echo "not ok $name"
        sed 's/^/    /' /tmp/output
        failures=$((failures + 1))
    fi
}
argument() {
    sed -n "s/.*\bdoppel\.$1=\([^ ]*\).*/\1/p" /proc/cmdline
}

has_address() { ip addr show dev eth0 | grep -q 'inet 10\.0\.2\.15/24'; }
has_route() { ip route | grep -q '^default via 10\.0\.2\.2 dev eth0'; }
has_resolver() { grep -q 'nameserver 10\.0\.2\.3' /etc/resolv.conf; }
has_link() { [ "$(cat /sys/class/net/eth0/carrier)" = 1 ]; }
has_own_mac() { grep -qv '^00:00:00:00:00:00' /sys/class/net/eth0/address; }
# The first answer needs the gateway's address; large ones come in several buffers or need fragments.
ping_small() { ping -c 3 -W 5 10.0.2.2; }
ping_large() { ping -c 3 -W 5 -s 1400 10.0.2.2; }
ping_fragments() { ping -c 3 -W 5 -s 4000 10.0.2.2; }
# The multicast filter and back: promiscuous, all multicast, another address, each by the control queue.
modes() {
    ip link set eth0 promisc on && ip link set eth0 promisc off && ifconfig eth0 allmulti &&
        ifconfig eth0 -allmulti && ping_small
}
link_cycle() { ip link set eth0 down && ip link set eth0 up && udhcpc -q -n -t 5 -T 2 -i eth0 && ping_small; }
no_errors() { [ "$(cat /sys/class/net/eth0/statistics/rx_errors)" = 0 ] && [ "$(cat /sys/class/net/eth0/statistics/tx_errors)" = 0 ]; }
fetch() { [ "$(wget -q -O - "$(argument url)" | md5sum | cut -d' ' -f1)" = "$(argument md5)" ]; }
serve() { echo served | nc -l -p "$(argument serve)" -w 60; }

check link has_link
check mac has_own_mac
check address has_address
check route has_route
check resolver has_resolver
check ping ping_small
check ping-large ping_large
check ping-fragments ping_fragments
check modes modes
check link-cycle link_cycle
[ -z "$(argument url)" ] || check fetch fetch
[ -z "$(argument serve)" ] || check serve serve
check no-errors no_errors
[ "$failures" = 0 ] && echo "network: passed" || echo "network: failed"
