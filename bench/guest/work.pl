# Hashes, regular expressions, sorting, string building.
my $n = shift;
my (%seen, $text, $sum);
for my $i (1 .. $n) {
    my $word = sprintf "w%dx", $i * 7919 % 1013;
    $seen{$word} += length $word;
    $text .= "$word " if $i % 3 == 0;
}
for my $word (sort keys %seen) {
    $sum = ($sum * 31 + $seen{$word}) % 1000003;
}
my $found = 0;
$found++ while $text =~ /w(\d)(\d+?)\1x/g;
(my $copy = $text) =~ s/(\d)(\d)/$2$1/g;
print "$sum $found ", length $copy, " ", unpack("%32C*", $copy), "\n";
