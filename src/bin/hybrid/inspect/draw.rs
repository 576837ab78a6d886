//! The drawings, as SVG for the page.

use hybrid_attention::generate::{Reason, Stub};
use hybrid_attention::thought::Map;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::stubs;
use crate::terminal::Result;

/// Colours that the page's style sheet replaces, so that drawings follow the light or dark scheme.
const INK: RGBColor = RGBColor(1, 1, 1);
const FAINT: RGBColor = RGBColor(2, 2, 2);
const GRID: RGBColor = RGBColor(3, 3, 3);
const CURVE: RGBColor = RGBColor(4, 4, 4);
const LIMIT: RGBColor = RGBColor(5, 5, 5);

/// Shades of the colour scale. Neighbouring cells of one shade become one rectangle.
const SHADES: f32 = 64.0;

/// Drift below which further passes change little.
const SETTLED: f64 = 0.03;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// The name of a row and column.
pub(super) struct Label {
    pub(super) text: String,
    /// Whether it is written in the text's own colour or a fainter one.
    pub(super) strong: bool,
}

/// Which numbers the colours stand for.
pub(super) struct Scale {
    pub(super) name: &'static str,
    pub(super) min: f32,
    pub(super) max: f32,
    /// Spreads small numbers out: the colour follows the square root.
    pub(super) root: bool,
}

impl Scale {
    /// Where a value stands between the ends, in `[0, 1]`.
    fn place(&self, value: f32) -> f32 {
        let share = (value - self.min) / (self.max - self.min).max(f32::MIN_POSITIVE);
        let share = if share.is_finite() { share.clamp(0.0, 1.0) } else { 0.0 };
        if self.root { share.sqrt() } else { share }
    }

    /// The value at a place in `[0, 1]`.
    fn value(&self, place: f32) -> f32 {
        let share = if self.root { place * place } else { place };
        self.min + share * (self.max - self.min)
    }

    /// None for what is not there.
    fn shade(&self, value: f32) -> Option<u32> {
        let shade = || (self.place(value) * (SHADES - 1.0)).round() as u32;
        value.is_finite().then(shade)
    }
}

fn colour(shade: u32) -> RGBColor {
    ViridisRGB.get_color(shade as f32 / (SHADES - 1.0))
}

/// Text of this height in pixels, anchored where it is drawn.
fn text_style(size: f64, colour: &RGBColor, h: HPos, v: VPos) -> TextStyle<'_> {
    // The backend divides by this factor.
    ("monospace", size * 1.24).into_font().color(colour).pos(Pos::new(h, v))
}

fn svg(size: (u32, u32), draw: impl FnOnce(&Area<'_>) -> Result<()>) -> Result<String> {
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
    draw(&area)?;
    area.present()?;
    drop(area);
    // What a page implies, repeated thousands of times.
    let svg = svg.replace(" xmlns=\"http://www.w3.org/2000/svg\"", "");
    Ok(svg.replace(" opacity=\"1\"", "").replace(" stroke=\"none\"", ""))
}

/// Drift by pass, and the line below which further passes change little. A pass that moved nothing is at
/// the bottom.
pub(super) fn drift(drift: &[f64]) -> Result<String> {
    let moved = drift.iter().copied().filter(|drift| *drift > 0.0);
    let (least, most) =
        moved.fold((SETTLED, SETTLED), |(least, most), drift| (least.min(drift), most.max(drift)));
    let (bottom, top) = (decade(least.max(1e-9).log10().floor()), decade(most.log10().ceil()));
    let passes = drift.len() as f64;
    svg((640, 280), |area| {
        let mut chart = ChartBuilder::on(area)
            .margin(12)
            .x_label_area_size(44)
            .y_label_area_size(76)
            .build_cartesian_2d(0.5..passes + 0.5, (bottom * 0.99..top * 1.01).log_scale())?;
        let words = |size| text_style(size, &INK, HPos::Center, VPos::Center);
        let whole = |x: &f64| if x.fract() == 0.0 { format!("{x}") } else { String::new() };
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID)
            .axis_style(GRID)
            .x_labels(2 * drift.len().min(12) + 1)
            .y_labels(5)
            .x_label_formatter(&whole)
            .y_label_formatter(&power_of_ten)
            .label_style(words(12.0))
            .axis_desc_style(words(12.0))
            .x_desc("pass")
            .y_desc("drift")
            .draw()?;
        let ends = [(0.5, SETTLED), (passes + 0.5, SETTLED)];
        chart.draw_series(DashedLineSeries::new(ends, 6, 4, LIMIT.stroke_width(1)))?;
        let points = || (1..).map(f64::from).zip(drift.iter().map(|drift| drift.max(bottom)));
        chart.draw_series(LineSeries::new(points(), CURVE.stroke_width(2)))?;
        chart.draw_series(points().map(|point| Circle::new(point, 4, CURVE.filled())))?;
        Ok(())
    })
}

/// A bar for each candidate, from its first token to its last, in the colours of its scores.
pub(super) fn race(stubs: &[&Stub]) -> Result<String> {
    let (left, row, bar, width) = (44, 20, 12, 420);
    let scores = || stubs.iter().flat_map(|stub| &stub.scores).map(|(_, score)| *score as f32);
    let (min, max) = (scores().fold(f32::MAX, f32::min), scores().fold(f32::MIN, f32::max));
    let scale = Scale { name: "score", min, max, root: false };
    let longest = stubs.iter().map(|stub| stub.ids.len()).max().unwrap_or(0).max(1);
    let at = |tokens: usize| left + (tokens.min(longest) * width as usize / longest) as i32;
    let bottom = row * stubs.len() as i32;
    svg(((left + width + 160) as u32, (bottom + 76) as u32), |area| {
        for (index, stub) in stubs.iter().enumerate() {
            let (top, won) = (index as i32 * row + 4, stub.reason == Reason::Won);
            let ink = if won { &INK } else { &FAINT };
            let style = text_style(11.0, ink, HPos::Right, VPos::Center);
            area.draw_text(&stub.index.to_string(), &style, (left - 6, top + bar / 2))?;
            let mut from = 0;
            for (to, score) in &stub.scores {
                // What a winner wrote after it was left alone, nobody judged.
                if let Some(shade) = scale.shade(*score as f32) {
                    let fill = colour(shade).filled();
                    area.draw(&Rectangle::new([(at(from), top), (at(*to), top + bar)], fill))?;
                }
                from = *to;
            }
            let end = at(stub.ids.len());
            area.draw(&Rectangle::new([(at(0), top), (end, top + bar)], FAINT.stroke_width(1)))?;
            let style = text_style(11.0, ink, HPos::Left, VPos::Center);
            area.draw_text(stubs::name(stub.reason), &style, (end + 6, top + bar / 2))?;
        }
        for (tokens, anchor) in [(0, HPos::Center), (longest, HPos::Center)] {
            let style = text_style(11.0, &FAINT, anchor, VPos::Top);
            area.draw_text(&tokens.to_string(), &style, (at(tokens), bottom + 4))?;
        }
        draw_legend(area, (left, bottom + 28), &scale)
    })
}

fn decade(exponent: f64) -> f64 {
    10f64.powf(exponent)
}

/// Only these are labelled along a logarithmic axis.
fn power_of_ten(value: &f64) -> String {
    let exponent = value.log10();
    match (exponent - exponent.round()).abs() < 1e-6 {
        true => format!("{value:.*}", (-exponent.round()).max(0.0) as usize),
        false => String::new(),
    }
}

/// Cells of colours with the names of their rows, of their columns if these have any, and a legend.
pub(super) fn heat_map(
    map: &Map,
    (rows, columns): (&[Label], &[Label]),
    (row, column): (&str, &str),
    scale: &Scale,
) -> Result<String> {
    let counts = (map.len().max(1), map.first().map_or(1, Vec::len).max(1));
    let cell = (600 / counts.0.max(counts.1)).clamp(9, 26) as i32;
    let font = (f64::from(cell) * 0.9).clamp(8.0, 12.0);
    let room = |labels: &[Label]| {
        let widest = labels.iter().map(|label| label.text.chars().count()).max().unwrap_or(0);
        (widest as f64 * font * 0.64) as i32 + 10
    };
    let (left, top) = (room(rows) + 20, room(columns) + 20);
    let (height, width) = (cell * counts.0 as i32, cell * counts.1 as i32);
    let size = (left + width.max(260) + 12, top + height + 64);

    svg((size.0 as u32, size.1 as u32), |area| {
        if !columns.is_empty() {
            let style = text_style(12.0, &FAINT, HPos::Left, VPos::Top);
            area.draw_text(&format!("{column} →"), &style, (left, 2))?;
        }
        let upwards = text_style(12.0, &FAINT, HPos::Right, VPos::Top);
        let upwards = upwards.transform(FontTransform::Rotate270);
        area.draw_text(&format!("← {row}"), &upwards, (2, top))?;
        let middle = |index: usize| index as i32 * cell + cell / 2;
        let ink = |label: &Label| if label.strong { &INK } else { &FAINT };
        for (index, label) in rows.iter().enumerate() {
            let style = text_style(font, ink(label), HPos::Right, VPos::Center);
            area.draw_text(&label.text, &style, (left - 5, top + middle(index)))?;
        }
        for (index, label) in columns.iter().enumerate() {
            let style = text_style(font, ink(label), HPos::Left, VPos::Center);
            let style = style.transform(FontTransform::Rotate270);
            area.draw_text(&label.text, &style, (left + middle(index), top - 5))?;
        }
        cells(area, map, (left, top), cell, scale)?;
        draw_legend(area, (left, top + height + 18), scale)
    })
}

/// A heat map that is too small for names.
pub(super) fn small_map(map: &Map, scale: &Scale) -> Result<String> {
    let count = map.len().max(1);
    let cell = (160 / count).clamp(3, 16) as i32;
    let side = (cell * count as i32) as u32;
    svg((side, side), |area| cells(area, map, (0, 0), cell, scale))
}

/// The legend: which colour means which number.
pub(super) fn legend(scale: &Scale) -> Result<String> {
    svg((272, 44), |area| draw_legend(area, (6, 2), scale))
}

fn draw_legend(area: &Area<'_>, (x, y): (i32, i32), scale: &Scale) -> Result<()> {
    let step = 3;
    let width = SHADES as i32 * step;
    for shade in 0..SHADES as i32 {
        let from = x + shade * step;
        let style = colour(shade as u32).filled();
        area.draw(&Rectangle::new([(from, y), (from + step, y + 12)], style))?;
    }
    for (place, anchor) in [(0.0, HPos::Left), (0.5, HPos::Center), (1.0, HPos::Right)] {
        let style = text_style(11.0, &INK, anchor, VPos::Top);
        let at = x + (place * width as f32) as i32;
        area.draw_text(&format!("{:.2}", scale.value(place)), &style, (at, y + 16))?;
    }
    let style = text_style(11.0, &FAINT, HPos::Left, VPos::Top);
    Ok(area.draw_text(scale.name, &style, (x, y + 30))?)
}

fn cells(
    area: &Area<'_>,
    map: &Map,
    (left, top): (i32, i32),
    cell: i32,
    scale: &Scale,
) -> Result<()> {
    for (row, values) in map.iter().enumerate() {
        let y = top + row as i32 * cell;
        let mut x = left;
        for run in values.chunk_by(|a, b| scale.shade(*a) == scale.shade(*b)) {
            let end = x + run.len() as i32 * cell;
            if let Some(shade) = run.first().and_then(|value| scale.shade(*value)) {
                area.draw(&Rectangle::new([(x, y), (end, y + cell)], colour(shade).filled()))?;
            }
            x = end;
        }
    }
    Ok(())
}
