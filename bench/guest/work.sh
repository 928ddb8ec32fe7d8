# The shell alone: arithmetic, tests, functions, string handling; no other program.
count=$1
i=0
sum=0
word=abcdefgh
add() { sum=$((sum + $1)); }
while [ $i -lt $count ]; do
    i=$((i + 1))
    case $i in
    *7) add 3 ;;
    *) add 1 ;;
    esac
    word=${i#?}${word%"${word#???}"}
done
echo "$sum $word"
