//! Linux guests whose writes are recorded, and then every crash that their disks could have had.
//!
//! A file system that is told the truth survives them all, and has every file whose fsync had
//! returned. One that is mounted without barriers, or whose flushes lie, does not, and then the
//! explorer must find that, shrink it, and print a command that shows it again.
//!
//! What only the file system's own driver can recover (the journals of XFS and btrfs), a guest is
//! shown state by state, while it runs.
//!
//! `VUBLK_EXPLORER` names the program that explores; with it (`.ci/run release` gives it the release
//! binary) the recorded workload is as large as the states are many: 300 files, some 20,000 states.
//! Without it the debug binary explores a smaller one. `VUBLK_TEST_ORACLE=all` looks for the files
//! in all of the states.
//!
//! What guests need, and what is skipped without it, is told in `guest.rs`.

#[macro_use]
mod common;

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use common::scratch::text;
use common::{Backend, Boot, Disk, Guest, Scratch, announce};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// The program that explores, and whether it is another one than the tests' own.
fn explorer() -> (PathBuf, bool) {
    match std::env::var_os("VUBLK_EXPLORER") {
        Some(path) => (path.into(), true),
        None => (env!("CARGO_BIN_EXE_vublk").into(), false),
    }
}

/// A log, and the disk as it was before.
struct Recorded {
    scratch: Scratch,
    log: PathBuf,
    base: PathBuf,
}

impl Recorded {
    fn new(size: u64) -> Recorded {
        let scratch = Scratch::new();
        let base = scratch.raw("base.raw", size);
        Recorded { log: scratch.file("w.log"), base, scratch }
    }

    fn serve(&self, size: u64) -> Backend {
        let disk = self.scratch.raw("disk.raw", size);
        Backend::start(&self.scratch, &Disk::raw(&disk).recorded(&self.log).controlled())
    }

    /// Explores; the exit code, and the report.
    fn explore(&self, check: &str, options: &[&str]) -> (Option<i32>, Value) {
        let mut command = Command::new(explorer().0);
        command.args(["log", "explore", "--log", text(&self.log), "--base", text(&self.base)]);
        command.args(["-f", "raw", "--output", "json", "--check", check]).args(options);
        let output = command.output().expect("the explorer starts");
        let report = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
            panic!("{command:?}: {error}\n{}", String::from_utf8_lossy(&output.stderr))
        });
        (output.status.code(), report)
    }

    /// Explores, and asserts that all states are good. Says how many there were, duplicates not
    /// counted.
    #[track_caller]
    fn assert_good(&self, what: &str, check: &str, options: &[&str]) -> u64 {
        let (code, report) = self.explore(check, options);
        assert_eq!(report["failed"], 0, "{what}: {report:#}");
        assert_eq!((code, &report["finished"]), (Some(0), &true.into()), "{what}");
        let number = |name: &str| report[name].as_f64().expect("a number");
        announce(&format!(
            "{what}: {} states, {} of them checked and {} alike, in {:.1} s: {:.0} checked/s",
            number("states"),
            number("checked"),
            number("alike"),
            number("seconds"),
            number("checked") / number("seconds"),
        ));
        (number("checked") + number("alike")) as u64
    }

    /// Explores until a state is not good, and asserts that the report is what somebody needs who has
    /// to find out why: few writes, and a command that does it again.
    #[track_caller]
    fn assert_caught(&self, what: &str, check: &str, options: &[&str]) {
        let (code, report) = self.explore(check, &[options, &["--stop-after", "1"]].concat());
        assert_eq!(code, Some(1), "{what}: nothing was found in {} states", report["states"]);
        let failure = &report["failures"][0];
        let faults = failure["dropped"].as_u64().unwrap() + failure["torn"].as_u64().unwrap();
        assert_eq!((&failure["shrunk"], &failure["flaky"]), (&true.into(), &false.into()));
        assert!(faults <= 3, "{what}: not shrunk: {failure:#}");

        let again = failure["reproduce"].as_str().expect("a command");
        let again = again.strip_prefix("vublk ").expect("a command of ours");
        let line = format!("{} {again}", text(&explorer().0));
        let output = Command::new("sh").args(["-c", &line]).output().expect("a shell");
        let printed = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(1), "{what}: {line}: {printed}");
        let state = failure["state"].as_str().expect("a name");
        assert!(printed.contains(&format!("{state}: ")), "{what}: {line}: {printed}");
        announce(&format!(
            "{what}: {state}, {faults} dropped or torn, found after {} checks in {:.1} s",
            report["checked"],
            report["seconds"].as_f64().unwrap(),
        ));
    }
}

/// Makes a mark in the log.
fn mark(guest: &Guest, qmp: &mut common::qmp::Qmp, text: &str) {
    qmp.run("x-vublk-log-mark", json!({"device": "disk", "mark": text}), guest.end());
}

// ---- a disk that keeps its word ---------------------------------------------------------------

/// Size of the disk of the large workload.
const SIZE: u64 = 200 * MIB;

/// Creates, syncs, renames and removes files, one after the other, and says so. Between two flushes
/// there are six writes or so, because two other files grow, each in a corner of its own, and
/// without delayed allocation their new blocks belong to the next transaction.
fn files_job(files: u32) -> String {
    format!(
        r#"
kill $explainer
mkfs.ext4 -q -b 4096 -J size=4 -E lazy_itable_init=0,lazy_journal_init=0 /dev/vda
sync
say made; hear
mount -t ext4 -o nodelalloc /dev/vda /mnt
mkdir /mnt/d /mnt/a /mnt/b
sync
block=$(printf %04000d 0)
k=1
while [ $k -le {files} ]; do
  for loose in a b; do echo "$block$block" >>/mnt/$loose/loose; done
  echo "file $k $block" >/mnt/d/new.$k
  dd of=/mnt/d/new.$k conv=notrunc,fsync </dev/null 2>/dev/null
  say synced $k; hear
  mv /mnt/d/new.$k /mnt/d/file.$k
  [ $((k % 3)) != 0 ] || rm /mnt/d/file.$((k - 2))
  k=$((k + 1))
done
umount /mnt
"#
    )
}

/// Recovers and checks a state, and looks for what was promised: all names and sizes, and what is in
/// the last three files. A mark `synced K` is made between the K-th fsync and the renaming after it.
const ORACLE: &str = r#"
e2fsck -y -E journal_only "$1"; [ $? -le 1 ] || exit 1
e2fsck -fn "$1" || exit 1
case $2 in 'synced '*) k=${2#synced } ;; *) exit 0 ;; esac
{ echo 'ls -p /d'; for j in 0 1 2; do echo "cat /d/file.$((k - j))"; done; echo "cat /d/new.$k"; } |
  debugfs -f - "$1" 2>/dev/null | awk -v k="$k" '
  /^\/[0-9]/ { split($0, field, "/"); size[field[6]] = field[7] }
  /^file [0-9]+ 0+$/ && length($3) == 4000 { whole[$2] = 1 }
  function must(name, j) {
    if (size[name] != length("file " j " ") + 4001) { print name " is missing or short"; bad = 1 }
    if (j > k - 3 && !whole[j]) { print "what is in " name " is wrong"; bad = 1 }
  }
  END {
    for (j = 1; j < k; j++)
      if (j % 3 != 1 || j + 2 > k) must("file." j, j)
      else if (j + 2 < k && ("file." j) in size) { print "file." j " is back"; bad = 1 }
    must((("new." k) in size) ? "new." k : "file." k, k)
    exit bad
  }'
"#;

/// Around how many of the last files all states are looked at for what must be there.
const ORACLE_FILES: u32 = 1;

#[test]
fn every_crash_of_ext4_is_survived() {
    need_guests!("every_crash_of_ext4_is_survived");
    need_vublk!("every_crash_of_ext4_is_survived", "does not record");
    let files = if explorer().1 { 300 } else { 40 };
    let recorded = Recorded::new(SIZE);
    let mut backend = recorded.serve(SIZE);
    let boot = Boot::new(&recorded.scratch, "files", files_job(files));
    let mut guest = boot.deadline(Duration::from_secs(300)).start(&backend);
    let mut qmp = backend.qmp(guest.end());
    guest.expect("made");
    mark(&guest, &mut qmp, "made");
    guest.tell("go on");
    for file in 1..=files {
        assert_eq!(guest.expect_while("synced", || backend.assert_alive()), file.to_string());
        mark(&guest, &mut qmp, &format!("synced {file}"));
        guest.tell("go on");
    }
    guest.finish();
    backend.assert_stops();

    let after = ["--start-mark", "made"];
    let flushes = [&after[..], &["--states", "flush"]].concat();
    recorded.assert_good("ext4, at each flush", "ext4", &flushes);
    let checked = recorded.assert_good("ext4, all subsets", "ext4", &after);
    assert!(checked > 20 * u64::from(files), "the workload has hardly any states: {checked}");

    let script = recorded.scratch.file("oracle");
    std::fs::write(&script, ORACLE).expect("a script");
    let oracle = format!("sh '{}' {{}} {{mark}}", text(&script));
    let all = std::env::var("VUBLK_TEST_ORACLE").is_ok_and(|which| which == "all");
    let which = if all { &after[..] } else { &flushes[..] };
    let checked = recorded.assert_good("ext4, what was synced is there", &oracle, which);
    assert!(checked > u64::from(files), "not every mark was looked at: {checked}");
    // And not only just after a flush: all subsets and torn writes around the last files.
    let start = format!("synced {}", files - ORACLE_FILES);
    let part = ["--start-mark", &start, "--states", "flush,reorder,torn"];
    let checked = recorded.assert_good("ext4, what was synced is always there", &oracle, &part);
    assert!(checked > 20 * u64::from(ORACLE_FILES), "hardly any states: {checked}");
    // The oracle is no good if it cannot fail: a state of long ago, and the last mark.
    let forgetful = format!("sh '{}' {{}} 'synced {files}'", text(&script));
    let (code, report) =
        recorded.explore(&forgetful, &[&flushes[..], &["--stop-after", "1"]].concat());
    assert_eq!(code, Some(1), "{report:#}");
    let printed = report["failures"][0]["output"].as_str().expect("what it printed");
    assert!(printed.contains("is missing or short"), "{printed}");
}

// ---- a guest that is shown one state after the other ------------------------------------------

/// Size of a disk that all file systems are content with.
const MOUNTED: u64 = 320 * MIB;
/// How many files are synced on it.
const MOUNTED_FILES: u32 = 5;

/// How a guest makes a file system, and how it looks for damage in one that is clean.
fn tools(kind: &str) -> (&'static str, &'static str) {
    match kind {
        "ext4" => ("mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0", "e2fsck -fn"),
        "xfs" => ("mkfs.xfs -q", "xfs_repair -n"),
        "btrfs" => ("mkfs.btrfs -q", "btrfs check"),
        other => panic!("no tools for {other}"),
    }
}

/// What a file holds, in both jobs.
const CONTENT: &str = r#"content() { echo "file $1 $block"; }; block=$(printf %04000d 0)"#;

/// Creates files, syncs each, says so, and renames it.
fn synced_job(kind: &str) -> String {
    let (make, _) = tools(kind);
    format!(
        r#"
kill $explainer
{CONTENT}
{make} /dev/vda
sync
say made; hear
mount -t {kind} /dev/vda /mnt
mkdir /mnt/d
sync
for k in $(seq {MOUNTED_FILES}); do
  content $k >/mnt/d/new.$k
  dd of=/mnt/d/new.$k conv=notrunc,fsync </dev/null 2>/dev/null
  say synced $k; hear
  mv /mnt/d/new.$k /mnt/d/file.$k
  [ $((k % 3)) != 0 ] || rm /mnt/d/file.$((k - 2))
done
umount /mnt
"#
    )
}

/// Mounts what the disk is at the moment, each time the host says which file was synced last; looks
/// for the files up to that one, by either of their names; and looks for damage.
fn carousel_job(kind: &str) -> String {
    let (_, check) = tools(kind);
    format!(
        r#"
kill $explainer
{CONTENT}
found() {{ [ -f $1 ] && [ "$(cat $1)" = "$(content $2)" ]; }}
look() {{
  mount -t {kind} /dev/vda /mnt || {{ echo cannot be mounted; return; }}
  for j in $(seq $1); do
    # Whether it was removed depends on how far the next ones are.
    if [ $((j % 3)) = 1 ] && [ $((j + 2)) -le $1 ]; then continue; fi
    found /mnt/d/file.$j $j || found /mnt/d/new.$j $j || echo file $j is not what was synced
  done
  umount /mnt
  {check} /dev/vda >/tmp/check 2>&1 || {{ echo {check} says:; tail -n 5 /tmp/check; }}
}}
while hear; [ "$heard" != end ]; do
  blockdev --flushbufs /dev/vda
  look $heard >/tmp/look 2>&1
  say verdict $(tr '\n' ' ' </tmp/look)
done
"#
    )
}

/// A state for each flush, and with what came after it missing in part: all but its first write, and
/// its last one alone. Each with the last file that its guest had been told is durable.
fn states(log: &std::path::Path) -> Vec<(String, u32)> {
    let list = common::vublk(&["log", "list", "--output", "json", text(log)]);
    let list: Vec<Value> = serde_json::from_str(&list).expect("a list");
    let mut states = Vec::new();
    let mut is_made = false;
    // Since the last flush: where it ended, how many writes, the last file that was synced.
    let (mut start, mut writes, mut synced) = (0, 0, 0);
    for entry in &list {
        let number = entry["entry"].as_u64().expect("a number");
        if let Some(mark) = entry["mark"].as_str() {
            is_made |= mark == "made";
            synced = mark.strip_prefix("synced ").map_or(synced, |k| k.parse().expect("a number"));
            continue;
        }
        if entry["flags"] != json!(["FLUSH"]) {
            writes += 1;
            continue;
        }
        if is_made {
            states.push((format!("E{start}"), synced));
            if writes > 1 {
                states.push((format!("E{start}:s=0{}", "1".repeat(writes - 1)), synced));
                states.push((format!("E{start}:s={}1", "0".repeat(writes - 1)), synced));
            }
        }
        (start, writes) = (number + 1, 0);
    }
    states.push((format!("E{start}"), synced));
    states
}

/// Records a guest's work on a file system. With `lies`, flushes are answered and not done once it is
/// made.
fn record_synced(kind: &str, lies: bool) -> Recorded {
    let recorded = Recorded::new(MOUNTED);
    let mut backend = recorded.serve(MOUNTED);
    let boot = Boot::new(&recorded.scratch, "files", synced_job(kind));
    let mut guest = boot.deadline(Duration::from_secs(120)).start(&backend);
    let mut qmp = backend.qmp(guest.end());
    guest.expect("made");
    mark(&guest, &mut qmp, "made");
    if lies {
        let faults = json!({"device": "disk", "flush-lies-one-in": 1});
        qmp.run("x-vublk-fault-set", faults, guest.end());
    }
    guest.tell("go on");
    for file in 1..=MOUNTED_FILES {
        assert_eq!(guest.expect("synced"), file.to_string());
        mark(&guest, &mut qmp, &format!("synced {file}"));
        guest.tell("go on");
    }
    guest.finish();
    backend.assert_stops();
    recorded
}

/// Shows another guest what a power cut could have left, one state after the other.
fn assert_recovered_by_a_guest(kind: &str) {
    let recorded = record_synced(kind, false);
    let states = states(&recorded.log);
    assert!(states.len() > MOUNTED_FILES as usize, "hardly any states: {states:?}");
    let disk = Disk::raw(&recorded.base).crash_state(&recorded.log, &states[0].0).controlled();
    let mut backend = Backend::start(&recorded.scratch, &disk);
    let boot = Boot::new(&recorded.scratch, "carousel", carousel_job(kind));
    let mut guest = boot.deadline(Duration::from_secs(300)).start(&backend);
    let mut qmp = backend.qmp(guest.end());
    guest.expect("up");
    let mut show = |state: &str, synced: u32| {
        let state = json!({"device": "disk", "state": state});
        qmp.run("x-vublk-crash-present", state, guest.end());
        guest.tell(&synced.to_string());
        guest.expect_while("verdict", || backend.assert_alive())
    };
    let begun = Instant::now();
    for (state, synced) in &states {
        assert_eq!(show(state, *synced), "", "{kind}, {state}");
    }
    let seconds = begun.elapsed().as_secs_f64();
    announce(&format!(
        "{kind}, one guest: {} states in {seconds:.1} s: {:.1} states/s",
        states.len(),
        states.len() as f64 / seconds
    ));
    // It can tell: what was not yet there at the first state is missed.
    let verdict = show(&states[0].0, 1);
    assert!(verdict.contains("file 1 is not what was synced"), "{verdict}");
    guest.tell("end");
    guest.finish();
    backend.assert_stops();
}

#[test]
fn a_guest_goes_through_crashes_of_ext4() {
    need_guests!("a_guest_goes_through_crashes_of_ext4");
    need_vublk!("a_guest_goes_through_crashes_of_ext4", "knows no crash states");
    assert_recovered_by_a_guest("ext4");
}

#[test]
fn a_guest_goes_through_crashes_of_btrfs() {
    need_guests!("a_guest_goes_through_crashes_of_btrfs");
    need_vublk!("a_guest_goes_through_crashes_of_btrfs", "knows no crash states");
    assert_recovered_by_a_guest("btrfs");
}

// ---- a guest that is asked ----------------------------------------------------------------------

/// Answers what the explorer asks: the file system must be mountable and have each file that was
/// synced before the last mark, by either of its names, and no damage.
fn answering_job(kind: &str) -> String {
    let (_, check) = tools(kind);
    format!(
        r#"
kill $explainer
cat >/tmp/look <<'END'
set -e
{CONTENT}
found() {{ [ -f $1 ] && [ "$(cat $1)" = "$(content $2)" ]; }}
mount -t {kind} /dev/vda /mnt
missing=
case $MARK in synced*)
  last=${{MARK#synced }}
  for j in $(seq $last); do
    if [ $((j % 3)) = 1 ] && [ $((j + 2)) -le $last ]; then continue; fi
    found /mnt/d/file.$j $j || found /mnt/d/new.$j $j || missing="$missing $j"
  done ;;
esac
umount /mnt
[ -z "$missing" ] || {{ echo missing:$missing; exit 9; }}
{check} /dev/vda
END
crash-guest /dev/vda /dev/vdb sh /tmp/look
"#
    )
}

/// Explores with a guest as the checker; the exit code, and the report.
fn ask_a_guest(recorded: &Recorded, kind: &str, options: &[&str]) -> (Option<i32>, Value) {
    let report = recorded.scratch.file("report.json");
    let known = ["--log", text(&recorded.log), "--base", text(&recorded.base), "-f", "raw"];
    let how = ["--output", "json", "--start-mark", "made"];
    let arguments = [&known[..], &how, options].concat();
    let mut explorer = Backend::explore(&recorded.scratch, &explorer().0, &arguments, &report);
    let boot = Boot::new(&recorded.scratch, "asked", answering_job(kind)).with_mailbox();
    let mut guest = boot.deadline(Duration::from_secs(300)).start(&explorer);
    guest.finish();
    let status = explorer.await_end(guest.end());
    let report = std::fs::read(&report).expect("a report");
    let report = serde_json::from_slice(&report)
        .unwrap_or_else(|error| panic!("{error}: {status}, {}", explorer.log()));
    (status.code(), report)
}

#[test]
fn a_guest_is_asked_about_crashes_of_xfs() {
    need_guests!("a_guest_is_asked_about_crashes_of_xfs");
    need_vublk!("a_guest_is_asked_about_crashes_of_xfs", "knows no crash states");
    let recorded = record_synced("xfs", false);
    let (code, report) = ask_a_guest(&recorded, "xfs", &["--states", "flush"]);
    assert_eq!((code, &report["failed"]), (Some(0), &0.into()), "{report:#}");
    let number = |name: &str| report[name].as_f64().expect("a number");
    assert!(number("checked") > f64::from(MOUNTED_FILES), "hardly any states: {report:#}");
    announce(&format!(
        "xfs, asked by mailbox: {} states in {:.1} s: {:.1} states/s",
        number("checked"),
        number("seconds"),
        number("checked") / number("seconds"),
    ));

    let recorded = record_synced("xfs", true);
    let (code, report) = ask_a_guest(&recorded, "xfs", &["--stop-after", "1"]);
    assert_eq!(code, Some(1), "a disk that lies was not caught: {report:#}");
    let failure = &report["failures"][0];
    assert_eq!((&failure["shrunk"], &failure["flaky"]), (&true.into(), &false.into()));
    let verdict = failure["verdict"].as_str().expect("a verdict");
    assert!(verdict.starts_with("the guest says: exit code"), "{failure:#}");
    let again = failure["reproduce"].as_str().expect("a command");
    assert!(again.contains(" --guest "), "{again}");
    announce(&format!(
        "xfs on a disk that lies: {}, {verdict}, after {} checks in {:.1} s",
        failure["state"],
        report["checked"],
        report["seconds"].as_f64().unwrap(),
    ));
}

// ---- disks that do not --------------------------------------------------------------------------

/// Size of the disk of the small workloads.
const SMALL: u64 = 32 * MIB;
/// How many different workloads must be caught.
const SEEDS: u32 = 20;
/// How many of them one guest does.
const SEEDS_PER_BOOT: u32 = 10;

/// File systems, one after the other, each with files in an order of its own.
fn rounds_job(seeds: &[u32], options: &str) -> String {
    let seeds: Vec<_> = seeds.iter().map(u32::to_string).collect();
    format!(
        r#"
kill $explainer
for seed in {seeds}; do
  mkfs.ext4 -q -F /dev/vda
  say made $seed; hear
  mount -t ext4 -o {options} /dev/vda /mnt
  n=$seed
  for step in 1 2 3 4 5 6; do
    n=$(((n * 1103 + 12345) % 65536))
    name=/mnt/$((n % 4))
    case $((n / 4 % 4)) in
      0) mkdir $name.$step; echo $n >$name.$step/file ;;
      1) rm -rf $name* ;;
      *) echo $n $seed >$name; mv $name $name.$step.moved ;;
    esac
    dd of=/mnt/synced.$step conv=fsync </proc/cpuinfo 2>/dev/null
  done
  umount /mnt
  say done $seed; hear
  dd of=/dev/vda conv=notrunc,fsync </dev/null 2>/dev/null
  say flushed $seed; hear
done
"#,
        seeds = seeds.join(" "),
    )
}

/// Records all rounds; `before` and `after` are what the host does to the disk around each of them.
/// Then each must be caught.
fn assert_all_caught(
    what: &str,
    options: &str,
    before: impl Fn(&mut common::qmp::Qmp, u32, Instant),
    after: impl Fn(&mut common::qmp::Qmp, Instant),
) {
    let seeds: Vec<u32> = (1..=SEEDS).collect();
    let mut dropped = 0;
    for seeds in seeds.chunks(SEEDS_PER_BOOT as usize) {
        let recorded = Recorded::new(SMALL);
        let mut backend = recorded.serve(SMALL);
        let boot = Boot::new(&recorded.scratch, "rounds", rounds_job(seeds, options));
        let mut guest = boot.deadline(Duration::from_secs(180)).start(&backend);
        let mut qmp = backend.qmp(guest.end());
        for seed in seeds {
            assert_eq!(guest.expect("made"), seed.to_string());
            mark(&guest, &mut qmp, &format!("made {seed}"));
            before(&mut qmp, *seed, guest.end());
            guest.tell("go on");
            guest.expect("done");
            after(&mut qmp, guest.end());
            guest.tell("go on");
            guest.expect("flushed");
            mark(&guest, &mut qmp, &format!("flushed {seed}"));
            guest.tell("go on");
        }
        guest.finish();
        backend.assert_stops();
        for seed in seeds {
            let (start, end) = (format!("made {seed}"), format!("flushed {seed}"));
            let part = ["--start-mark", &start, "--end-mark", &end, "--seed", &seed.to_string()];
            recorded.assert_caught(&format!("{what}, seed {seed}"), "ext4", &part);
            dropped += 1;
        }
    }
    assert_eq!(dropped, SEEDS);
}

#[test]
fn a_file_system_without_barriers_is_caught() {
    need_guests!("a_file_system_without_barriers_is_caught");
    need_vublk!("a_file_system_without_barriers_is_caught", "does not record");
    assert_all_caught("without barriers", "nobarrier", |_, _, _| {}, |_, _| {});
}

#[test]
fn flushes_that_lie_are_caught() {
    need_guests!("flushes_that_lie_are_caught");
    need_vublk!("flushes_that_lie_are_caught", "does not lie");
    assert_all_caught(
        "flushes that lie",
        "barrier",
        |qmp, seed, end| {
            let faults = json!({"device": "disk", "flush-lies-one-in": 1, "seed": seed});
            qmp.run("x-vublk-fault-set", faults, end);
        },
        |qmp, end| drop(qmp.run("x-vublk-fault-clear", json!({"device": "disk"}), end)),
    );
}
