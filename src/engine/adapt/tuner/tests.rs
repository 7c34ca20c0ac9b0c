//! Goal: estimates follow what ran, and say when another plan should be looked for.
//! Method: passes made up, one after the other.

use super::*;

fn pass(compute_s: f64, rate: f64) -> PassTimes {
    PassTimes {
        compute_s: vec![compute_s; 4],
        outside_s: 0.0,
        inside_s: 4.0 * compute_s,
        copied: Some((1_000_000, 1e6 / rate)),
    }
}

#[test]
fn passes_1_2_4_and_8_are_due() {
    let mut tuner = Tuner::new();
    let due: Vec<u64> = (1..=20)
        .filter(|_| tuner.observe(&pass(0.1, 1e9), Some(0.4)) == Some(Reason::Due))
        .collect();
    assert_eq!(due, [1, 2, 4, 8, 16]);
}

#[test]
fn small_changes_are_smoothed_and_large_ones_taken_over() {
    let mut tuner = Tuner::new();
    tuner.observe(&pass(0.1, 1e9), None);
    tuner.observe(&pass(0.11, 1e9), None);
    let compute_s = |tuner: &Tuner| tuner.times(4).expect("known").compute_s[0];
    assert!((compute_s(&tuner) - 0.105).abs() < 1e-9, "the mean");
    tuner.observe(&pass(0.2, 0.5e9), None);
    assert!((compute_s(&tuner) - 0.2).abs() < 1e-9);
    assert!((tuner.times(4).expect("known").link.bytes_per_s - 0.5e9).abs() < 1.0);
    assert!(tuner.times(5).is_none(), "of another order nothing is known");
}

#[test]
fn an_estimate_is_a_mean_that_forgets_and_trusts_itself_less_after_news() {
    let rate = |tuner: &Tuner| tuner.times(4).expect("known").link.bytes_per_s;
    let mut tuner = Tuner::new();
    for _ in 0..20 {
        tuner.observe(&pass(0.1, 1.0e9), None);
    }
    tuner.observe(&pass(0.1, 1.1e9), None);
    assert!((rate(&tuner) - 1.015e9).abs() < 1.0);
    assert_eq!((tuner.ends(0.4), tuner.ends(0.44)), (None, Some(News::Small)));
    tuner.observe(&pass(0.1, 1.1e9), None);
    assert!((rate(&tuner) - 1.0575e9).abs() < 1.0, "half of the way");
    tuner.observe(&pass(0.1, 0.5e9), None);
    tuner.observe(&pass(0.1, 0.52e9), None);
    assert!((rate(&tuner) - 0.51e9).abs() < 1.0, "nothing is left of before a jump");
}

#[test]
fn where_passes_are_never_alike_the_last_one_alone_is_no_estimate() {
    let known = |tuner: &Tuner| {
        let times = tuner.times(4).expect("known");
        (times.compute_s[0], times.link.bytes_per_s)
    };
    let mut tuner = Tuner::new();
    for number in 0..24 {
        let slower = if number % 2 == 0 { 1.0 } else { 1.4 };
        tuner.observe(&pass(0.1 * slower, 1e9 * slower), None);
        let (compute_s, rate) = known(&tuner);
        let is_mean = (0.11..0.13).contains(&compute_s) && (1.1e9..1.3e9).contains(&rate);
        assert!(number < 12 || is_mean, "pass {number}: {compute_s} s, {rate}");
    }
    tuner.observe(&pass(0.3, 3e9), None);
    let (compute_s, rate) = known(&tuner);
    assert!((compute_s - 0.3).abs() < 1e-9 && (rate - 3e9).abs() < 1.0, "beyond all of them");
    tuner.forget_uses();
    tuner.observe(&pass(0.1, 1.2e9), None);
    assert!((known(&tuner).1 - 1.2e9).abs() < 1.0, "the link's last rates are known still");
}

#[test]
fn where_there_is_news_all_the_time_estimates_are_trusted_as_before() {
    let after_news = |before: &[f64]| {
        let mut tuner = Tuner::new();
        for &inside_s in before {
            tuner.ends(inside_s);
        }
        for _ in 0..20 {
            tuner.observe(&pass(0.1, 1e9), None);
        }
        assert!(tuner.ends(2.0).is_some());
        tuner.observe(&pass(0.11, 1e9), None);
        tuner.times(4).expect("known").compute_s[0]
    };
    assert!((after_news(&[0.4]) - 0.105).abs() < 1e-9, "half of it is new");
    let restless = [0.4, 0.5, 0.6, 0.75, 0.9, 1.1];
    assert!((after_news(&restless) - 0.1015).abs() < 1e-9, "no more than ever");
}

#[test]
fn of_what_lies_between_passes_pauses_do_not_count() {
    let mut tuner = Tuner::new();
    let outside_s = |tuner: &Tuner| tuner.times(4).expect("known").outside_s;
    let known = [0.5, 0.01, 0.02, 0.6, 0.01, 0.7, 0.03].map(|seconds| {
        tuner.observe(&PassTimes { outside_s: seconds, ..pass(0.1, 1e9) }, None);
        outside_s(&tuner)
    });
    let right = [0.5, 0.01, 0.02, 0.02, 0.02, 0.02, 0.03];
    assert!(known.iter().zip(right).all(|(known, right)| (known - right).abs() < 1e-12));
    for _ in 0..3 {
        tuner.observe(&PassTimes { outside_s: 60.0, ..pass(0.1, 1e9) }, None);
    }
    assert!((outside_s(&tuner) - MOST_OUTSIDE * 0.4).abs() < 1e-9, "it is always that long");
}

#[test]
fn what_was_put_off_is_due_at_the_next_pass() {
    let mut tuner = Tuner::new();
    let observe = |tuner: &mut Tuner| tuner.observe(&pass(0.1, 1e9), Some(0.4));
    let first: Vec<_> = (0..4).map(|_| observe(&mut tuner)).collect();
    assert_eq!(first, [Some(Reason::Due), Some(Reason::Due), None, Some(Reason::Due)]);
    tuner.put_off();
    assert_eq!(observe(&mut tuner), Some(Reason::Due));
    assert_eq!(observe(&mut tuner), None);
}

#[test]
fn a_moved_link_and_a_missed_prediction_are_reasons() {
    let mut tuner = Tuner::new();
    for _ in 0..5 {
        tuner.observe(&pass(0.1, 1e9), Some(0.4));
    }
    assert_eq!(tuner.observe(&pass(0.1, 0.8e9), Some(0.4)), Some(Reason::Moved));
    assert_eq!(tuner.observe(&pass(0.1, 0.8e9), Some(0.4)), None);
    for _ in 0..3 {
        tuner.observe(&pass(0.1, 0.8e9), Some(0.4));
    }
    for _ in 0..2 {
        tuner.observe(&pass(0.1, 0.8e9), Some(0.4));
    }
    assert_eq!(tuner.observe(&pass(0.1, 0.8e9), Some(0.5)), Some(Reason::Missed));
    assert_eq!(tuner.observe(&pass(0.1, 0.8e9), Some(0.5)), None, "not at every pass");
}

#[test]
fn a_pass_of_another_length_is_news() {
    let mut tuner = Tuner::new();
    let news = [1.0, 1.03, 1.0, 1.2, 1.2, 1.1].map(|inside_s| tuner.ends(inside_s));
    let (small, large) = (Some(News::Small), Some(News::Large));
    assert_eq!(news, [None, None, None, large, None, small], "1.03 to 1.2, and 1.2 to 1.1");
}

#[test]
fn a_first_block_that_takes_quite_another_time_is_news() {
    let mut tuner = Tuner::new();
    let news = [0.1, 0.11, 0.1, 0.2, 0.2, 0.05].map(|first_s| tuner.begins(first_s));
    let large = Some(News::Large);
    assert_eq!(news, [None, None, None, large, None, large]);
}

#[test]
fn where_passes_never_take_the_same_time_only_what_is_beyond_them_all_is_news() {
    let mut tuner = Tuner::new();
    let mut news = |spans: &[f64]| spans.iter().filter(|&&s| tuner.ends(s).is_some()).count();
    assert_eq!(news(&[1.0, 1.2, 1.0, 1.2]), 3);
    assert_eq!(news(&[1.0, 1.2].repeat(20)), 1, "too restless to forget the other one");
    assert_eq!(news(&[1.24, 0.97, 1.2]), 0, "not by more than 4 %");
    assert_eq!(news(&[1.0; 12]), 0);
    assert_eq!(news(&[1.5, 1.5, 1.0, 1.0]), 2, "after a while of rest");
    assert_eq!(news(&[1.5, 1.0, 1.5, 1.0]), 3);
    assert_eq!(news(&[1.8; 12]), 1, "for good, however restless it was before");
}

#[test]
fn the_last_pause_is_known_and_a_callers_is_cut() {
    let mut tuner = Tuner::new();
    assert_eq!(tuner.pause_s(), None);
    tuner.paused(0.03);
    assert_eq!(tuner.pause_s(), Some(0.03));
    tuner.forget_uses();
    assert_eq!(tuner.pause_s(), Some(0.03));
    tuner.paused_longer(0.05);
    assert!(tuner.pause_s().is_some_and(|pause_s| (pause_s - 0.08).abs() < 1e-9));
    tuner.paused_longer(-1.0);
    assert!(tuner.pause_s().is_some_and(|pause_s| (pause_s - 0.08).abs() < 1e-9));
    tuner.paused(3600.0);
    assert_eq!(tuner.pause_s(), Some(MOST_PAUSE_S));
}

#[test]
fn less_is_expected_of_a_plan_the_sooner_the_last_ones_were_replaced() {
    let mut tuner = Tuner::new();
    let mut horizons = Vec::new();
    for _ in 0..3 {
        tuner.paused(0.01);
        horizons.push(tuner.horizon());
        tuner.ends(1.0);
    }
    assert_eq!(horizons, [10.0, 5.5, 3.25]);
    for _ in 0..40 {
        tuner.ends(1.0);
    }
    assert!((tuner.horizon() - PASSES).abs() < 1e-9);
}
