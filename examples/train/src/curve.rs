//! The loss curve of a run as a drawing.

use std::path::Path;

use plotters::prelude::*;

use crate::record::Point;
use crate::settings::Settings;
use crate::terminal::{self, Result};

/// The loss curve, and where each lesson began.
pub(crate) fn draw(path: &Path, settings: &Settings, curve: &[Point]) -> Result<()> {
    let root = SVGBackend::new(path, (720, 360)).into_drawing_area();
    root.fill(&WHITE)?;
    let highest = curve.iter().map(|point| point.loss).fold(0.0, f32::max);
    // A run that starts from a checkpoint has most of the way behind it.
    let lowest = curve.iter().map(|point| point.loss).fold(highest, f32::min);
    let lowest = if settings.model.is_some() { lowest * 0.95 } else { 0.0 };
    let mut chart = ChartBuilder::on(&root)
        .caption(format!("{} (seed {})", settings.arm.name(), settings.seed), ("sans-serif", 18))
        .margin(10)
        .x_label_area_size(36)
        .y_label_area_size(48)
        .build_cartesian_2d(0..settings.steps.max(1), lowest..highest.max(lowest + 0.1))?;
    let label = |value: &f32| match lowest {
        0.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    };
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_desc("steps")
        .y_desc("loss, nats")
        .y_label_formatter(&label)
        .draw()?;
    for pair in curve.windows(2).filter(|pair| pair[0].lesson != pair[1].lesson) {
        let at = pair[1].step;
        chart.draw_series(LineSeries::new([(at, lowest), (at, highest)], BLACK.mix(0.2)))?;
    }
    let points = curve.iter().map(|point| (point.step, point.loss));
    chart.draw_series(LineSeries::new(points, BLUE.stroke_width(2)))?;
    root.present()?;
    terminal::say(&format!("[wrote {}]", path.display()));
    Ok(())
}
