//! The table and the figure of recorded runs.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{Write, stdout};
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use serde::Deserialize;

use flashback_suite::{LONGEST, LONGEST_TRAINED};

use crate::score::Scores;
use crate::terminal::{self, Result};

/// What the report needs from a run's record.
#[derive(Deserialize)]
struct Record {
    settings: Settings,
    test: Scores,
}

#[derive(Deserialize)]
struct Settings {
    arm: String,
}

/// The table's name for each arm, in the table's order.
const ARMS: [(&str, &str); 5] = [
    ("both-ways", "both ways"),
    ("causal", "causal passes"),
    ("one-pass", "trained with one pass"),
    ("no-passes", "no passes"),
    ("deep", "no passes, as many layers as four run"),
];

/// Shares of right answers for chains of 1, 2, … facts: one list for each seed.
type Seeds = Vec<Vec<f64>>;

/// Prints the table of the records in the folder `runs`, and draws the figure.
///
/// # Errors
/// When there are no records, or a file cannot be read or written.
pub fn report(runs: &Path, figure: &Path) -> Result<()> {
    terminal::check_folder(figure)?;
    let mut by_arm = BTreeMap::<(String, usize), Seeds>::new();
    let mut chances = Vec::new();
    for path in terminal::records(runs)? {
        let record: Record = terminal::read_record(&path)?;
        for (&passes, right) in record.test.passes.iter().zip(record.test.right) {
            by_arm.entry((record.settings.arm.clone(), passes)).or_default().push(right);
        }
        chances.push(record.test.chance);
    }
    let chance = means(&chances);
    write!(stdout(), "{}", table(&by_arm, &chance))?;
    draw(figure, &by_arm, &chance)?;
    terminal::say(&format!("[wrote {}]", figure.display()));
    Ok(())
}

/// Percent, for each arm and number of passes: mean and standard deviation over the seeds.
fn table(by_arm: &BTreeMap<(String, usize), Seeds>, chance: &[f64]) -> String {
    let mut text = String::from("| passes see | seeds | passes |");
    for length in 1..=LONGEST {
        let _ = write!(text, " {length} |");
    }
    let _ = writeln!(text, "\n|{}", "---|".repeat(3 + LONGEST));
    for (arm, name) in ARMS {
        for ((_, passes), seeds) in by_arm.iter().filter(|((of, _), _)| of == arm) {
            let _ = write!(text, "| {name} | {} | {passes} |", seeds.len());
            for (mean, deviation) in means(seeds).iter().zip(deviations(seeds)) {
                let _ = write!(text, " {:.0}", mean * 100.0);
                if deviation >= 0.005 {
                    let _ = write!(text, " ±{:.0}", deviation * 100.0);
                }
                text.push_str(" |");
            }
            text.push('\n');
        }
    }
    text.push_str("| a guess among the ends | | |");
    for share in chance {
        let _ = write!(text, " {:.0} |", share * 100.0);
    }
    text.push('\n');
    text
}

fn means(seeds: &[Vec<f64>]) -> Vec<f64> {
    let at = |length: usize| seeds.iter().filter_map(move |seed| seed.get(length));
    let count = seeds.len().max(1) as f64;
    (0..LONGEST).map(|length| at(length).sum::<f64>() / count).collect()
}

/// Standard deviations of a sample; 0 for a single seed.
fn deviations(seeds: &[Vec<f64>]) -> Vec<f64> {
    let freedom = seeds.len().saturating_sub(1).max(1) as f64;
    let squares = |(length, mean): (usize, f64)| -> f64 {
        seeds.iter().filter_map(|seed| seed.get(length)).map(|share| (share - mean).powi(2)).sum()
    };
    means(seeds).into_iter().enumerate().map(|at| (squares(at) / freedom).sqrt()).collect()
}

/// The lowest and the highest of the seeds.
fn ranges(seeds: &[Vec<f64>]) -> Vec<[f64; 2]> {
    let at = |length: usize| seeds.iter().filter_map(move |seed| seed.get(length).copied());
    (0..LONGEST)
        .map(|length| [at(length).fold(1.0, f64::min), at(length).fold(0.0, f64::max)])
        .collect()
}

struct Line {
    name: &'static str,
    color: RGBColor,
    seeds: Seeds,
}

/// On the left the method by passes, on the right its controls.
fn draw(path: &Path, by_arm: &BTreeMap<(String, usize), Seeds>, chance: &[f64]) -> Result<()> {
    let root = SVGBackend::new(path, (960, 400)).into_drawing_area();
    root.fill(&WHITE)?;
    let (left, right) = root.split_horizontally(480);
    let of = |arm: &str, passes: usize| by_arm.get(&(arm.to_string(), passes));
    let lines = |wanted: &[(&str, usize, &'static str, u32)]| -> Vec<Line> {
        let found = wanted.iter().filter_map(|(arm, passes, name, color)| {
            let [_, r, g, b] = color.to_be_bytes();
            Some(Line { name, color: RGBColor(r, g, b), seeds: of(arm, *passes)?.clone() })
        });
        found.collect()
    };
    let method = lines(&[
        ("both-ways", 0, "0 passes", 0xb5d4ea),
        ("both-ways", 1, "1 pass", 0x6baed6),
        ("both-ways", 2, "2 passes", 0x3181bd),
        ("both-ways", 3, "3 passes", 0x1b559c),
        ("both-ways", 4, "4 passes", 0x08306b),
        ("both-ways", 8, "8 passes", 0x7a5195),
    ]);
    let controls = lines(&[
        ("both-ways", 4, "both ways, 4 passes", 0x08306b),
        ("causal", 4, "causal, 4 passes", 0xd95f02),
        ("causal", 8, "causal, 8 passes", 0xe6ab02),
        ("one-pass", 1, "both ways, 1 pass", 0x1b9e77),
        ("no-passes", 0, "no passes", 0xe7298a),
        ("deep", 0, "no passes, 12 layers", 0x666666),
    ]);
    panel(&left, "Thinking both ways", &method, chance)?;
    panel(&right, "Controls of the same budget", &controls, chance)?;
    root.present()?;
    Ok(())
}

/// Shares of right answers by length of chain: a line for the mean, a band from the lowest to the
/// highest seed.
fn panel(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    title: &str,
    lines: &[Line],
    chance: &[f64],
) -> Result<()> {
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 17))
        .margin(8)
        .x_label_area_size(36)
        .y_label_area_size(48)
        .build_cartesian_2d(1usize..LONGEST, 0f64..1f64)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(WHITE)
        .x_labels(LONGEST)
        .x_desc("facts from the question to the answer")
        .y_label_formatter(&|share| format!("{:.0} %", share * 100.0))
        .draw()?;
    let trained = [(LONGEST_TRAINED, 0.0), (LONGEST_TRAINED, 1.0)];
    chart.draw_series(DashedLineSeries::new(trained, 3, 3, BLACK.mix(0.4).into()))?;
    let guess = (1..).zip(chance.iter().copied());
    chart
        .draw_series(DashedLineSeries::new(guess, 2, 4, BLACK.into()))?
        .label("a guess")
        .legend(|(x, y)| PathElement::new([(x, y), (x + 16, y)], BLACK));
    for Line { name, color, seeds } in lines {
        let color = *color;
        let ranges = ranges(seeds);
        let side = |end: usize| (1..).zip(&ranges).map(move |(length, range)| (length, range[end]));
        let back: Vec<(usize, f64)> = side(1).collect();
        let band: Vec<(usize, f64)> = side(0).chain(back.into_iter().rev()).collect();
        chart.draw_series([Polygon::new(band, color.mix(0.15))])?;
        let mean = (1..).zip(means(seeds));
        chart
            .draw_series(LineSeries::new(mean, color.stroke_width(2)))?
            .label(*name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerLeft)
        .margin(4)
        .legend_area_size(21)
        .background_style(WHITE.mix(0.8))
        .draw()?;
    Ok(())
}
