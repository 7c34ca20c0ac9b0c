//! Goal: the schedule enqueues each command as soon as it may, and nothing that it need not.
//! Method: the exact commands of small programs; no device.

use std::sync::Arc;

use dgls_core::driver::EventSlot;
use dgls_core::engine::{Adapt, Command, Options, Schedule};
use dgls_core::plan::{Copy, Profile, Program, Tensor, Use, Wait, plan};

fn commands(act: impl FnOnce(&mut Vec<Command>)) -> Vec<Command> {
    let mut out = Vec::new();
    act(&mut out);
    out
}

fn enter(schedule: &mut Schedule, block: u32) -> Vec<Command> {
    commands(|out| assert!(schedule.enter(block, out).is_ok()))
}

fn exit(schedule: &mut Schedule) -> Vec<Command> {
    commands(|out| assert!(schedule.exit(out).is_ok()))
}

/// Blocks of one tensor each, none of them resident, through two slots.
fn streaming(blocks: u32, order: Vec<u32>) -> Schedule {
    let tensors = (0..blocks).map(|block| Tensor { block, bytes: 1024 }).collect();
    let profile = Profile { tensors, order, ..Profile::default() };
    let plan = plan(&profile, 2048).expect("two slots");
    assert_eq!(plan.slots(), 2);
    Schedule::new(Arc::new(plan.program), Options::default(), &[])
}

fn run(schedule: &mut Schedule, blocks: impl IntoIterator<Item = u32>) {
    for block in blocks {
        enter(schedule, block);
        exit(schedule);
    }
}

/// The copies of a list of commands.
fn copies(commands: &[Command]) -> Vec<u32> {
    let copy = |command: &Command| match command {
        Command::Copy { index } => Some(*index),
        _ => None,
    };
    commands.iter().filter_map(copy).collect()
}

#[test]
fn in_order_a_block_costs_four_commands_and_a_copy() {
    let mut schedule = streaming(4, vec![0, 1, 2, 3]);
    let commands = commands(|out| schedule.prefetch(out));
    assert_eq!(copies(&commands), [0, 1], "one for each slot");
    run(&mut schedule, 0..4);
    let acquire = Command::Acquire { slot: EventSlot(4), ticket: 5, timed: false };
    assert_eq!(enter(&mut schedule, 0), [acquire]);
    let over = EventSlot(4);
    assert_eq!(
        exit(&mut schedule),
        [
            Command::Release(over),
            Command::WaitDone(over),
            Command::Copy { index: 2 },
            Command::Ready { slot: EventSlot(6), ticket: 7 },
        ]
    );
}

/// Whether the first copy waits for what is still decoded for uses that did not come.
fn waits_for_decoding(commands: &[Command]) -> bool {
    let copy = commands.iter().position(|command| matches!(command, Command::Copy { .. }));
    let wait = commands.iter().position(|&command| command == Command::WaitDecoded);
    wait.is_some_and(|wait| copy.is_none_or(|copy| wait < copy))
}

#[test]
fn a_skipped_block_gives_its_slot_away_at_once() {
    let mut schedule = streaming(4, vec![0, 1, 2, 3]);
    run(&mut schedule, 0..4);
    // Uses 4 and 5 are enqueued: block 0, which does not come, and block 1.
    let commands = enter(&mut schedule, 1);
    assert_eq!(copies(&commands), [2], "into the slot of block 0, beside block 1");
    assert!(!commands.contains(&Command::Cancel));
    assert!(waits_for_decoding(&commands), "block 0 may not have been decoded yet: {commands:?}");
    let next = exit(&mut schedule);
    assert!(!next.contains(&Command::WaitDecoded), "once: {next:?}");
}

#[test]
fn what_comes_out_of_turn_is_fetched_on_demand() {
    let mut schedule = streaming(4, vec![0, 1, 2, 3]);
    run(&mut schedule, 0..4);
    let commands = enter(&mut schedule, 3);
    assert_eq!(commands[0], Command::Cancel);
    assert_eq!(copies(&commands)[0], 3);
    assert!(waits_for_decoding(&commands), "{commands:?}");
    assert_eq!(commands.last().map(|last| matches!(last, Command::Acquire { .. })), Some(true));
}

#[test]
fn nothing_is_prefetched_beside_a_dormant_block_that_streams() {
    let mut schedule = streaming(4, vec![0, 1]);
    run(&mut schedule, [0, 1]);
    let fetched = enter(&mut schedule, 3);
    assert_eq!((fetched[0], copies(&fetched)), (Command::Cancel, vec![3]));
    assert!(waits_for_decoding(&fetched), "{fetched:?}");
    assert_eq!(commands(|out| schedule.prefetch(out)), []);
    assert_eq!(copies(&exit(&mut schedule)), [0, 1], "what it displaced");
}

#[test]
fn a_block_that_is_not_in_the_plan_changes_nothing() {
    let mut schedule = streaming(4, vec![0, 1, 2, 3]);
    run(&mut schedule, 0..2);
    assert_eq!(commands(|out| assert!(schedule.enter(4, out).is_err())), []);
    let acquire = Command::Acquire { slot: EventSlot(2), ticket: 3, timed: false };
    assert_eq!(enter(&mut schedule, 2), [acquire]);
    assert_eq!(commands(|out| assert!(schedule.enter(3, out).is_err())), []);
    assert_eq!(schedule.active_block(), Some(2));
}

/// Three uses; the second has a copy that may come at any time and one that waits for the third.
fn in_parts(timing: bool) -> Schedule {
    let used = |block: u32, copies| Use { block, copies, offsets: Vec::new() };
    let copy = |tensor, wait| Copy {
        tensor,
        source_offset: 0,
        target_offset: u64::from(tensor) << 10,
        bytes: 1024,
        wait,
    };
    let program = Program {
        uses: vec![used(0, 0..0), used(1, 0..2), used(2, 2..2)],
        cycle: 3,
        copies: vec![copy(0, None), copy(1, Some(Wait { position: 2, lag: 1 }))],
        loads: vec![Vec::new(); 3],
        passes: 1,
    };
    Schedule::new(Arc::new(program), Options { timing, ..Options::default() }, &[])
}

#[test]
fn a_use_is_prefetched_in_parts() {
    let mut schedule = in_parts(true);
    run(&mut schedule, 0..1);
    let early = enter(&mut schedule, 1);
    assert_eq!(copies(&early), [0], "of the next pass; the other one waits for block 2");
    assert!(early.contains(&Command::CopyStart(EventSlot(4))));
    assert!(!early.iter().any(|c| matches!(c, Command::Ready { slot: EventSlot(4), .. })));
    assert_eq!(copies(&exit(&mut schedule)), [0_u32; 0]);
    assert_eq!(copies(&enter(&mut schedule, 2)), [0_u32; 0]);
    let late = exit(&mut schedule);
    assert_eq!(copies(&late), [1]);
    assert!(late.contains(&Command::CopyStart(EventSlot(4))), "another stretch begins");
    assert_eq!(schedule.stretch(4).len(), 1, "of the one copy that came late");
    assert!(late.iter().any(|c| matches!(c, Command::Ready { slot: EventSlot(4), .. })));
}

#[test]
fn a_part_that_was_prefetched_does_not_count_after_a_cancel() {
    let mut schedule = in_parts(true);
    run(&mut schedule, 0..2);
    // Block 1 again: one of its copies is enqueued, but may have been dropped from the queue.
    let commands = enter(&mut schedule, 1);
    assert_eq!(commands[0], Command::Cancel);
    assert_eq!(copies(&commands)[..2], [0, 1]);
}

/// Four blocks that all fit, once around.
fn resident(timing: bool) -> Schedule {
    let tensors = (0..4).map(|block| Tensor { block, bytes: 1024 }).collect();
    let profile = Profile { tensors, order: vec![0, 1, 2, 3], ..Profile::default() };
    let plan = plan(&profile, 4096).expect("all fits");
    let options = Options { timing, ..Options::default() };
    let mut schedule = Schedule::new(Arc::new(plan.program), options, &[]);
    run(&mut schedule, 0..4);
    schedule
}

#[test]
fn a_block_that_is_there_costs_no_command() {
    let mut schedule = resident(false);
    for block in (0..4).chain([2, 2, 0]) {
        assert!(schedule.expects_quiet(block) || block == 2 || block == 0);
        assert_eq!(enter(&mut schedule, block), []);
        assert_eq!(exit(&mut schedule), []);
    }
    let end = schedule.unmarked().expect("the end of the last use");
    schedule.marked(end);
    assert_eq!((schedule.unmarked(), schedule.last_done()), (None, Some(end)));
}

#[test]
fn another_stream_waits_once_for_what_is_there() {
    let mut schedule = resident(false);
    schedule.switch_stream();
    assert!(!schedule.expects_quiet(0));
    let entered = enter(&mut schedule, 0);
    assert!(matches!(entered[..], [Command::Ready { .. }, Command::Acquire { .. }]), "{entered:?}");
    assert!(matches!(exit(&mut schedule)[..], [Command::Release(_)]));
    assert_eq!(enter(&mut schedule, 1), []);
}

#[test]
fn changed_weights_are_brought_and_waited_for() {
    let mut schedule = resident(false);
    schedule.reload(1);
    let early = enter(&mut schedule, 0);
    let rest = &early[1..];
    // What was on its way may be decoded still.
    let [Command::WaitDecoded, Command::Load { block: 1 }, Command::Ready { .. }] = rest else {
        panic!("{early:?}");
    };
    exit(&mut schedule);
    assert!(!schedule.expects_quiet(1));
    assert!(matches!(enter(&mut schedule, 1)[..], [Command::Acquire { .. }]));
    assert!(matches!(exit(&mut schedule)[..], [Command::Release(_)]));
}

#[test]
fn the_end_of_a_block_whose_weights_change_while_it_runs_is_marked() {
    let mut schedule = resident(false);
    assert_eq!(enter(&mut schedule, 0), []);
    schedule.reload(0);
    let ended = exit(&mut schedule);
    assert!(
        matches!(ended[..2], [Command::Release(a), Command::WaitDone(b)] if a == b),
        "{ended:?}"
    );
    assert!(ended.contains(&Command::Load { block: 0 }));
}

#[test]
fn what_is_timed_or_waited_for_is_marked() {
    let mut timed = resident(true);
    let last = enter(&mut timed, 0).pop();
    assert!(matches!(last, Some(Command::Acquire { timed: true, .. })), "{last:?}");
    assert!(exit(&mut timed).iter().any(|command| matches!(command, Command::Release(_))));

    let mut schedule = in_parts(false);
    run(&mut schedule, [0, 1, 2, 0, 1]);
    assert_eq!(
        enter(&mut schedule, 2).len(),
        1,
        "a copy waits for this use, which streams nothing"
    );
    assert!(matches!(exit(&mut schedule)[0], Command::Release(_)));
    assert_eq!(enter(&mut schedule, 0), []);
}

/// Four blocks, through room for two.
fn streamed(options: Options) -> Schedule {
    let tensors = (0..4).map(|block| Tensor { block, bytes: 1024 }).collect();
    let profile = Profile { tensors, order: (0..4).collect(), ..Profile::default() };
    let program = Arc::new(plan(&profile, 2048).expect("two slots").program);
    Schedule::new(program, options, &[])
}

/// Runs a pass of four blocks; which of them were timed, and for which copies were.
fn timed(schedule: &mut Schedule) -> (Vec<u32>, usize) {
    let (mut uses, mut copies) = (Vec::new(), 0);
    for block in 0..4 {
        let commands = [enter(schedule, block), exit(schedule)].concat();
        let is_timed = |c: &Command| matches!(c, Command::Acquire { timed: true, .. });
        uses.extend(commands.iter().any(is_timed).then_some(block));
        copies += commands.iter().filter(|c| matches!(c, Command::CopyStart(_))).count();
    }
    (uses, copies)
}

#[test]
fn of_each_pass_the_first_and_the_last_use_are_timed_and_after_news_all() {
    let mut schedule = streamed(Options { adapt: Adapt::AtOnce, ..Options::default() });
    for pass in 0..10 {
        let expected = if (4..8).contains(&pass) { vec![0, 3] } else { vec![0, 1, 2, 3] };
        assert_eq!(timed(&mut schedule).0, expected, "pass {pass}");
    }
    timed(&mut schedule);
    assert_eq!(timed(&mut schedule), (vec![0, 3], 2));
    let number = 4 * 12;
    schedule.sample(false);
    assert!(schedule.stretch(number + 1).is_empty(), "enqueued before, without a mark");
    assert_eq!(timed(&mut schedule), (vec![0, 1, 2, 3], 4));
    for expected in [vec![0, 1, 2, 3], vec![0, 1, 2, 3], vec![0, 3]] {
        assert_eq!(timed(&mut schedule).0, expected);
    }
    run(&mut schedule, [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3]);
    enter(&mut schedule, 0);
    schedule.sample(false);
    exit(&mut schedule);
    assert!(matches!(enter(&mut schedule, 1)[..], [Command::Acquire { timed: false, .. }, ..]));
    exit(&mut schedule);
    run(&mut schedule, 2..4);
    assert_eq!(timed(&mut schedule).0, [0, 1, 2, 3], "from the next pass on");
}

/// Of `passes`, those of which all uses are timed; `news` says whether there are any before a pass,
/// and whether they are large.
fn sampled(passes: std::ops::Range<u32>, news: impl Fn(u32) -> Option<bool>) -> Vec<u32> {
    let mut schedule = streamed(Options { adapt: Adapt::AtOnce, ..Options::default() });
    let mut all = Vec::new();
    for pass in 0..passes.end {
        if let Some(is_large) = news(pass) {
            schedule.sample(is_large);
        }
        all.extend((timed(&mut schedule).0.len() == 4).then_some(pass));
    }
    all.into_iter().filter(|pass| passes.contains(pass)).collect()
}

#[test]
fn a_plan_that_lasts_is_timed_less_often() {
    assert_eq!(sampled(16..100, |_| None), [16, 17, 24, 25, 32, 33, 64, 65, 96, 97]);
}

#[test]
fn news_in_a_row_wait_but_not_those_of_a_large_change() {
    let small = |at: &'static [u32]| move |pass| at.contains(&pass).then_some(false);
    assert_eq!(sampled(34..64, small(&[35, 40])), [35, 36, 37, 40, 41, 42], "two at once");
    assert_eq!(sampled(34..80, small(&[35, 40, 45]))[6..], [64, 65, 67, 68, 69], "the third later");
    assert_eq!(sampled(34..90, small(&[35, 40, 80]))[8..], [80, 81, 82], "or after a rest");
    let large = |pass| [35, 40, 45, 50].contains(&pass).then_some(pass == 50);
    assert_eq!(sampled(34..90, large)[6..], [50, 51, 52, 64, 65], "instead of the one that waits");
    // In every pass: six of 32, and two more.
    let expected = [34..40, 64..72, 96..104, 128..136, 160..164].into_iter().flatten();
    assert!(sampled(34..164, |pass| (pass >= 34).then_some(false)).into_iter().eq(expected));
}

#[test]
fn the_copies_of_a_timed_use_are_known_until_its_marks_are_used_again_for_timed_ones() {
    let mut schedule = streamed(Options { timing: true, ..Options::default() });
    run(&mut schedule, [0, 1, 2, 3].repeat(6));
    for number in 4 * 2..4 * 4 {
        assert_eq!(schedule.stretch(number).len(), 1, "use {number}, of a timed pass");
    }
    for number in 4 * 4..4 * 6 {
        assert!(schedule.stretch(number).is_empty(), "use {number}, of one that was not");
    }
}
