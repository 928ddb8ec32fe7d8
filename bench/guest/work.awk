# Word counts and sums by key.
{
    for (i = 1; i <= NF; i++) count[$i]++
    total += $2 * length($1) % 97
    if ($3 ~ /^q[a-z]*k/) quick++
    gsub(/e/, "E")
    letters += index($0, "E")
}
END {
    for (word in count) { words++; if (count[word] > most) most = count[word] }
    printf "%d %d %d %d %d\n", words, most, total, quick, letters
}
