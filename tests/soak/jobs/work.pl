# work.pl SEED: hashes, arrays, regular expressions, sorting, formats, packing, closures, local signals and processes.
use strict; use warnings; use Digest::SHA qw(sha256_hex); use List::Util qw(sum shuffle);
my $seed = $ARGV[0]; srand($seed);
sub rnd { $seed = ($seed * 69069 + 1) % 4294967296; return $seed >> 16 }
my (%count, @lines);
push @lines, join ' ', map { sprintf '%s%d', chr(97 + rnd() % 26), rnd() } 1 .. 8 for 1 .. 12000;
for (@lines) { $count{$1}{length $2}++ while /([a-m])(\d*7\d*)\b/g; s/(\w)(\d+)/$2$1/g if /z1/ }
print join(',', map { my $k = $_; "$k:" . join '/', map { "$_=$count{$k}{$_}" } sort keys %{$count{$k}} } sort keys %count), "\n";
print sha256_hex(join "\n", sort { substr($a, 3) cmp substr($b, 3) or $a cmp $b } @lines), "\n";
my @n = map { rnd() * 65536 + rnd() } 1 .. 60000;
print sha256_hex(join ',', sort { $a % 10007 <=> $b % 10007 or $a <=> $b } @n), "\n";
my $packed = join '', map { pack 'NvCa3d<', $_ & 0xffffffff, $_ & 0xffff, $_ & 255, $_, $_ / 3 } @n[0 .. 5000];
print sha256_hex($packed), ' ', sum(map { (unpack 'NvC', substr $packed, $_ * 18, 7)[0] % 1000 } 0 .. 5000), "\n";
my @subs = map { my $i = $_; sub { $i = ($i * 31 + shift) % 1000003 } } 1 .. 50;
my $total = 0; for my $r (1 .. 4000) { $total += $_->($r) for @subs } print "$total\n";
my $text = ''; $text .= chr(rnd() % 256) for 1 .. 200000; my $swapped = reverse $text; $swapped =~ tr/a-z\x80-\xff/A-Z\x00-\x7f/; print sha256_hex($swapped), "\n";
my $alarms = 0; local $SIG{USR1} = sub { $alarms++ }; kill USR1 => $$ for 1 .. 300; print "$alarms\n";
my @kids; for my $k (1 .. 12) { pipe my $r, my $w; if (!fork) { close $r; print $w sha256_hex($k x 9999); close $w; exit $k } close $w; push @kids, $r }
print map { my $r = $_; scalar(<$r>) . "\n" } @kids; my $status = 0; while (wait != -1) { $status += $? >> 8 } print "$status\n";
