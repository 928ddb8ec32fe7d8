import java.math.BigInteger;
import java.security.MessageDigest;
import java.util.*;
import java.util.concurrent.*;
import java.util.stream.*;

/** Work SEED: what HotSpot compiles: collections, streams, strings, exceptions, virtual calls, synchronized and concurrent code, garbage. */
public class Work {
    interface Shape { double area(); }
    record Circle(double r) implements Shape { public double area() { return Math.PI * r * r; } }
    record Square(double a) implements Shape { public double area() { return a * a; } }
    record Oblong(double a, double b) implements Shape { public double area() { return a * b; } }

    static double shapes(Random random, int n) {
        double sum = 0;
        for (int i = 0; i < n; i++) {
            Shape s = switch (random.nextInt(3)) { case 0 -> new Circle(i % 10); case 1 -> new Square(i % 7); default -> new Oblong(i % 5, 2); };
            sum += s.area();
        }
        return sum;
    }

    static long collections(Random random, int n) {
        Map<String, List<Integer>> map = new HashMap<>();
        TreeMap<Integer, String> tree = new TreeMap<>();
        for (int i = 0; i < n; i++) {
            map.computeIfAbsent("k" + random.nextInt(500), k -> new ArrayList<>()).add(i);
            tree.put(random.nextInt(), Integer.toHexString(i));
        }
        long hash = 0;
        for (String key : new TreeSet<>(map.keySet()))
            hash = hash * 31 + map.get(key).stream().mapToLong(v -> v * 7L).sum() + key.hashCode();
        for (Map.Entry<Integer, String> e : tree.entrySet())
            hash = hash * 31 + e.getKey() + e.getValue().length();
        return hash;
    }

    static int exceptions(int n) {
        int caught = 0;
        int[] small = new int[10];
        String none = null;
        for (int i = 0; i < n; i++) {
            try {
                if (i % 3 == 0) small[i % 20]++;
                else if (i % 3 == 1) caught += 10 / (i % 5);
                else caught += (i % 4 == 0 ? none : "abc").length();      // a null check by SIGSEGV, once it is compiled
            } catch (ArrayIndexOutOfBoundsException e) { caught += 2; }
            catch (ArithmeticException e) { caught += 3; }
            catch (NullPointerException e) { caught += 5; }
        }
        return caught;
    }

    static int counter;
    static synchronized void count() { counter++; }

    static long threads(int n) throws Exception {
        ExecutorService pool = Executors.newFixedThreadPool(4);
        ConcurrentHashMap<Integer, Integer> shared = new ConcurrentHashMap<>();
        List<Future<Long>> results = new ArrayList<>();
        for (int t = 0; t < 4; t++) {
            final int mine = t;
            results.add(pool.submit(() -> {
                long sum = 0;
                for (int i = 0; i < n; i++) {
                    count();
                    shared.merge((i + mine) % 100, 1, Integer::sum);
                    sum += new byte[i % 300].length;
                }
                return sum;
            }));
        }
        long sum = 0;
        for (Future<Long> r : results)
            sum = sum * 31 + r.get();
        pool.shutdown();
        return sum + shared.values().stream().mapToInt(v -> v).sum() + counter;
    }

    public static void main(String[] arguments) throws Exception {
        Random random = new Random(Long.parseLong(arguments[0]));
        for (int round = 0; round < 3; round++) {
            System.out.println(shapes(random, 400000));
            System.out.println(collections(random, 40000));
            System.out.println(exceptions(60000));
            System.out.println(threads(40000));
            System.out.println(IntStream.range(0, 200000).parallel().filter(i -> i % 3 == 0).mapToObj(i -> "v" + i).collect(Collectors.joining()).hashCode());
            BigInteger b = new BigInteger(1024, random);
            System.out.println(b.modPow(new BigInteger(512, random), BigInteger.ONE.shiftLeft(1023).subtract(BigInteger.valueOf(1155))).toString(16));
            byte[] data = new byte[2000000];
            random.nextBytes(data);
            System.out.println(HexFormat.of().formatHex(MessageDigest.getInstance("SHA-256").digest(data)));
            System.out.println(String.format("%.12f %s", Math.sin(random.nextDouble()) + Math.pow(1.1, round), Arrays.hashCode(data)));
        }
    }
}
